"""The compiled kernels: built once for a machine from src/ by the compiler that is there, kept under the hash of sources, flags and CPU.

Nothing is compiled on import. An absent compiler is one clear line, and everything runs on stock operators.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewriter.backends.kernels.heads import Heads, call
from rewriter.backends.kernels.pack import Layout
from rewriter.backends.kernels.recurrences import Sizes
from rewriter.cache import default_folder, digest, write_atomically
from rewriter.errors import RewriteError

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-Wno-maybe-uninitialized", "-Wno-psabi")
LEVEL = "REWRITER_KERNELS"  # "" or native: all that the CPU has; avx2, portable: less; off: none


@dataclass(frozen=True)
class Build:
    """A library as it would be built here."""

    compiler: str
    flags: tuple[str, ...]
    path: Path

    @property
    def ready(self) -> bool:
        """Whether it is there."""
        return self.path.exists()


def compiler() -> str:
    """The path of the first C++ compiler: $CXX, else what is called one; RewriteError where there is none."""
    for name in [os.environ.get("CXX", ""), *COMPILERS]:
        if name and (found := shutil.which(name)):
            return found
    raise RewriteError(f"no C++ compiler is there ({', '.join(COMPILERS)}, or set CXX); models run on stock operators without kernels")


def level() -> str:
    """Which instructions are allowed, from $REWRITER_KERNELS."""
    found = os.environ.get(LEVEL, "") or "native"
    if found not in (allowed := ("native", "avx2", "portable", "off")):
        raise RewriteError(f"{LEVEL}={found}; allowed are {', '.join(allowed)}")
    return found


def described(instructions: str = "") -> Build:
    """What `build` would make; RewriteError without a compiler, or where kernels are switched off."""
    instructions = instructions or level()
    if instructions == "off":
        raise RewriteError(f"kernels are switched off by {LEVEL}=off")
    found = compiler()
    machine = {"native": ("-march=native",), "avx2": ("-mavx2", "-mfma"), "portable": ()}[instructions]
    flags = (*FLAGS, *machine, *openmp(found))
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = digest(*texts, *flags, cpu(), platform.machine(), _version(found))
    return Build(found, flags, default_folder() / "kernels" / f"{key}.so")


def build(instructions: str = "", force: bool = False) -> Path:
    """The library's path, compiled now if it is not there yet; RewriteError with the compiler's first error."""
    wanted = described(instructions)
    if force or not wanted.ready:
        sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
        write_atomically(wanted.path, lambda path: _compile([wanted.compiler, *wanted.flags, *sources, "-o", str(path)]))
    return wanted.path


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise RewriteError(f"the kernels do not compile with {command[0]}: {errors[0]}; models run on stock operators without kernels")


@functools.cache
def openmp(found: str) -> tuple[str, ...]:
    """The flag for threads, where the compiler has them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        made = str(source.with_suffix(".so"))
        done = subprocess.run([found, "-fopenmp", "-shared", "-fPIC", str(source), "-o", made], capture_output=True)
    return ("-fopenmp",) if done.returncode == 0 else ()


@functools.cache
def _version(found: str) -> str:
    return subprocess.run([found, "--version"], capture_output=True, text=True).stdout


@functools.cache
def cpu() -> str:
    """The CPU's name and features, as far as this system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


class Kernels:
    """An open library."""

    def __init__(self, path: Path) -> None:
        _share_openmp()
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.structured_check.restype = ctypes.c_char_p
        self.library.structured_skips.restype = ctypes.c_int64
        self.library.structured_recurrence.restype = ctypes.c_int64
        self.library.structured_attention.restype = ctypes.c_int64
        self.library.structured_matrices.restype = ctypes.c_int64
        lanes, panel = ctypes.c_int64(), ctypes.c_int64()
        self.library.structured_layout(ctypes.byref(lanes), ctypes.byref(panel))
        self.layout = Layout(lanes.value, panel.value)

    def matrices(self, wanted: bool = True) -> bool:
        """Whether products of 8 bits run on matrix registers (AMX) from now on: where the CPU has them, unless they are not wanted."""
        return bool(self.library.structured_matrices(ctypes.c_int64(wanted)))

    def run(
        self, packed: Tensor, x: Tensor, outputs: int, threads: int = 0, out: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """(..., n) float32 -> (..., outputs), by a packed chain; `threads` 0: torch's own number; `out`: (rows, outputs) to write to;
        skip (..., outputs): what the chain adds."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        packed = aligned(packed)
        self._check(packed, rows, outputs)
        y = rows.new_empty(len(rows), outputs) if out is None else out
        assert y.is_contiguous() and y.shape == (len(rows), outputs) and y.dtype == torch.float32
        added = rows.new_empty(0) if skip is None else skip.flatten(0, -2).contiguous()
        if self.library.structured_skips(ctypes.c_void_p(packed.data_ptr())) and (added.shape != y.shape or added.dtype != y.dtype):
            raise RewriteError(f"the kernel adds {list(y.shape)} float32 numbers, not {list(added.shape)} {added.dtype}")
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (packed, rows, added, y)]
        self.library.structured_run(*pointers, ctypes.c_int64(len(rows)), ctypes.c_int64(threads or torch.get_num_threads()))
        return y.reshape(*x.shape[:-1], outputs)

    def takes(self, sizes: Sizes | Heads) -> bool:
        """Whether the sizes of a recurrence, or an attention, fit together, within what the kernel's arithmetic holds."""
        if isinstance(sizes, Heads):
            return bool(self.library.structured_attention(sizes.packed()))
        return bool(self.library.structured_recurrence(sizes.packed(), ctypes.c_int64(1), ctypes.c_int64(1), (ctypes.c_int64 * 8)()))

    def recur(self, sizes: Sizes, inputs: Sequence[Tensor], outputs: Sequence[Sequence[int]], threads: int = 0) -> list[Tensor]:
        """The sequences, state and rates that the sizes ask for -> tensors of these shapes; RewriteError where an input does not fit."""
        given = [x.contiguous() for x in inputs]
        made = [given[0].new_empty(shape) for shape in outputs]
        batch, time = (ctypes.c_int64(n) for n in given[0].shape[:2])
        numbers = (ctypes.c_int64 * 8)()
        count = self.library.structured_recurrence(sizes.packed(), batch, time, numbers)
        held = [x.numel() for x in (*given, *made)]
        if count != len(given) or held != numbers[: len(held)] or any(x.dtype != torch.float32 for x in given):
            raise RewriteError(f"the kernel does not take {[f'{x.dtype} {list(x.shape)}' for x in given]} for {sizes}")
        pointers = [(ctypes.c_void_p * len(ts))(*[t.data_ptr() for t in ts]) for ts in (given, made)]
        self.library.structured_recur(sizes.packed(), *pointers, batch, time, ctypes.c_int64(threads or torch.get_num_threads()))
        return made

    def attend(self, sizes: Heads, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, threads: int = 0) -> Tensor:
        """Tensors as the sizes say they lie, a float32 mask of four axes that broadcasts and is added -> the output; RewriteError where an
        input does not fit."""
        given = {"query": query, "key": key, "value": value}
        lengths = {name: x.shape[1 if sizes.is_turned(name) else 2] for name, x in given.items()}
        fits = all(x.shape == sizes.shape(name, len(query), lengths["query" if name == "query" else "key"]) for name, x in given.items())
        whole = (len(query), sizes.heads, lengths["query"], lengths["key"])
        spread = mask is None or (mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape, whole, strict=True)))
        floats = all(x is None or x.dtype == torch.float32 for x in (*given.values(), mask))
        if not (self.takes(sizes) and fits and spread and floats):
            raise RewriteError(f"the kernel does not take {[f'{x.dtype} {list(x.shape)}' for x in given.values()]} for {sizes}")
        added = None if mask is None else mask.contiguous()
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(sizes.shape("output", len(query), lengths["query"]))
        said = call(sizes, query, key, value, added, out)
        self.library.structured_attend(sizes.packed(), said, ctypes.c_int64(threads or torch.get_num_threads()))
        return out

    def _check(self, packed: Tensor, rows: Tensor, outputs: int) -> None:
        wrong = self.library.structured_check(ctypes.c_void_p(packed.data_ptr()), ctypes.c_int64(packed.numel()))
        if wrong:
            raise RewriteError(f"the kernel refuses its weights: {wrong.decode()}")
        inputs, held = packed[32:48].view(torch.int64).tolist()
        if rows.dtype != torch.float32 or rows.shape[1] != inputs or outputs != held:
            raise RewriteError(f"the kernel maps {inputs} to {held} float32 numbers, not {rows.shape[1]} {rows.dtype} to {outputs}")


def aligned(packed: Tensor) -> Tensor:
    """The same bytes from an address that is a multiple of 64."""
    if packed.data_ptr() % 64 == 0:
        return packed
    room = torch.empty(packed.numel() + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start : start + packed.numel()].copy_(packed)


def _share_openmp() -> None:
    """Have the kernels use torch's pool of threads rather than a second one, where torch brings one."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_ONE = threading.Lock()


@functools.cache
def opened(instructions: str) -> Kernels:
    """See `kernels`."""
    try:
        return Kernels(build(instructions))
    except OSError as problem:
        where = f"{problem.filename or default_folder()}: {problem.strerror or problem}"
        raise RewriteError(f"the kernels cannot be kept or opened ({where}); set REWRITER_CACHE") from problem


def kernels(instructions: str = "") -> Kernels:
    """The library of this machine, built if need be; RewriteError where it cannot be."""
    with _ONE:  # whoever comes second waits for the first one's compiler
        return opened(instructions)
