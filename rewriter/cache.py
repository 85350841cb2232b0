"""What a run leaves for the next one: fits under the hash of what they depend on, timings under the hardware and versions.

Entries are written to a temporary name and renamed, so an interrupted run leaves only whole ones; a damaged entry counts as absent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.operator import AbstractMatrix, AbstractOperator, flatten, unflatten

if TYPE_CHECKING:
    from typing_extensions import Buffer

EMITTING = (
    "passes/structures/*.py",
    "backends/*.py",
    "backends/fx/*.py",
    "backends/onnx/*.py",
    "backends/kernels/*.py",
    "backends/kernels/src/*",
)
FITTING = ("*.py", "passes/*.py", "passes/solvers/**/*.py", "passes/structures/*.py")
VERSION = "1"  # of the entries' format: raise it when that changes


def default_folder() -> Path:
    """$REWRITER_CACHE, else rewriter/ in the user's cache folder."""
    given = os.environ.get("REWRITER_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rewriter"


def digest(*parts: object) -> str:
    """A hash of texts, numbers and bytes."""
    total = hashlib.sha256(VERSION.encode())
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:32]


def fingerprint(nodes: Iterable[str], stored: Iterable[tuple[str, Buffer]]) -> str:
    """A hash of a graph: its nodes as text, the bytes of its named tensors one at a time."""
    total = hashlib.sha256(VERSION.encode())
    for node in nodes:
        total.update(f"{node}\n".encode())
    for name, data in stored:
        total.update(f"{name}\n".encode())
        total.update(data)
    return total.hexdigest()[:32]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary neighbour of `path`, then rename it; on any failure the neighbour goes and `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file's whole content, where `write_atomically` wants a function."""
    path.write_text(text)


class FitCache:
    """Fitted operators on disk, one safetensors file each (no pickle): tensors as they are, the spec and figures as metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fits"

    def get(self, key: str) -> tuple[AbstractMatrix | None, dict[str, Any]] | None:
        """The stored operator (None for a stored refusal) and its figures; None where there is no readable entry."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                leaves = [file.get_tensor(str(i)) for i in range(int(meta["leaves"]))]
            operator = unflatten(meta["spec"], leaves) if meta["spec"] else None
            return operator, json.loads(meta["figures"])  # type: ignore[return-value]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def put(self, key: str, operator: AbstractOperator | None, figures: dict[str, Any]) -> None:
        """Store an entry; a cache that cannot be written is no reason to fail."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        leaves, spec = flatten(operator) if operator is not None else ([], "")
        meta = {"leaves": str(len(leaves)), "spec": spec, "figures": json.dumps(figures)}
        stored = {str(i): leaf.contiguous() for i, leaf in enumerate(leaves)}
        try:
            write_atomically(self.folder / f"{key}.safetensors", lambda path: save_file(stored, path, meta))
        except (OSError, SafetensorError):
            return


def hardware() -> str:
    """What timings depend on besides versions."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return f"{model} x{os.cpu_count()}"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


@functools.cache
def sources(patterns: tuple[str, ...] = EMITTING) -> str:
    """A hash of the code that forms are emitted by, or of other code: what changed makes another entry."""
    package = Path(__file__).parent
    files = sorted(file for pattern in patterns for file in package.glob(pattern))
    return digest(*[file.read_bytes() for file in files])


def measured(count: int, time: Callable[[], list[float]], *comparison: object) -> list[float]:
    """`count` seconds, timed together unless this same comparison was made before on this hardware by this code.

    The key is the whole comparison: only figures that were interleaved are ever put side by side.
    """
    path = default_folder() / "timings" / f"{digest(sources(), hardware(), *comparison)}.json"
    try:
        seconds = [float(s) for s in json.loads(path.read_text())]
        if len(seconds) == count:
            return seconds
    except (OSError, ValueError, TypeError):
        pass
    seconds = time()
    try:
        write_atomically(path, lambda temporary: write_text(temporary, json.dumps(seconds)))
    except OSError:
        return seconds
    return seconds
