"""The kernel under the compiler's sanitizers: no byte read or written outside, no undefined step, no race; also on damaged tensors."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewriter.backends.kernels.library import FLAGS, SOURCES, compiler, kernels
from rewriter.backends.kernels.pack import FORMATS, pack
from rewriter.backends.kernels.plan import PAIR, Plan, plan
from rewriter.passes.structures.low_rank import LowRank
from tests.kernels.spelled import in_4_bits, shuffled_blocks, spelled
from tests.kernels.test_chain import agree, ending

DRIVER = Path(__file__).parent / "sanitized.cpp"
SANITIZERS = {"memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "races": ("-fsanitize=thread",)}
NATIVE = ("-march=native",)
Case = tuple[Tensor, Tensor, Tensor]  # packed, x, skip


def built(folder: Path, sanitizer: str, driver: Path = DRIVER, kernel: str = "chain.cpp", machine: Sequence[str] = NATIVE) -> Path:
    """A driver and the kernel that it runs; the flags are the library's but for what makes it one."""
    program = folder / sanitizer
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-O3")]
    sources = [str(driver), str(SOURCES / kernel), f"-I{SOURCES}", f"-I{DRIVER.parent}"]
    options = [*flags, "-O1", "-g", *machine, "-pthread", *SANITIZERS[sanitizer]]
    subprocess.run([compiler(), *options, *sources, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("sanitized"), request.param)


def given(cases: Sequence[Case], folder: Path) -> Path:
    path = folder / "cases"
    with path.open("wb") as file:
        for packed, x, skip in cases:
            file.write(struct.pack("qqqq", packed.numel(), len(x), x.shape[1], skip.shape[1]))
            file.write(packed.numpy().tobytes() + x.numpy().tobytes() + skip.numpy().tobytes())
    return path


def ran(program: Path, cases: Sequence[Case], folder: Path, threads: int) -> Iterator[Tensor | None]:
    """What each case gave; None where it was refused."""
    out = folder / "out"
    done = subprocess.run([str(program), str(given(cases, folder)), str(out), str(threads)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    data = memoryview(out.read_bytes())
    for _, _, skip in cases:
        (finished,) = struct.unpack("q", data[:8])
        data = data[8:]
        yield torch.frombuffer(bytearray(data[: skip.nbytes]), dtype=torch.float32).view(skip.shape) if finished else None
        data = data[skip.nbytes if finished else 0 :]


def chain(seed: int) -> Plan:
    """Every third in 4 bits where that can be."""
    operator = spelled(seed, rows=1 if seed % 3 else PAIR)
    steps = plan(operator, ending(seed, operator.shape[0]))
    return steps if seed % 3 else in_4_bits(steps)


@pytest.mark.parametrize("threads", [1, 2])
def test_sound_chains(program: Path, threads: int, tmp_path: Path) -> None:
    kinds: list[tuple[Plan, str]] = [(chain(seed), FORMATS[seed % 4]) for seed in range(200)]
    kinds += [(plan(shuffled_blocks(2, 700, 33)), weights) for weights in FORMATS]  # weights in parts, of 21 to 24 rows
    rows = [(torch.randn(1 + i % 40, steps.inputs), torch.randn(1 + i % 40, steps.outputs)) for i, (steps, _) in enumerate(kinds)]
    cases = [(pack(steps, kernels().layout, weights), *pair) for (steps, weights), pair in zip(kinds, rows, strict=True)]
    for (steps, weights), (x, skip), y in zip(kinds, rows, ran(program, cases, tmp_path, threads), strict=True):
        assert y is not None
        agree(y, steps, x, weights, skip)


def test_an_overrun_would_be_seen(tmp_path: Path) -> None:
    """Planted: an x that is one number a row short, and a driver that does not mind."""
    steps = plan(LowRank(torch.randn(9, 4), torch.randn(4, 9)))
    packed, x = pack(steps, kernels().layout), torch.randn(2, steps.inputs)
    text = DRIVER.read_text().replace("chain.head.n == sizes[2]", "chain.head.n == sizes[2] + 1")
    (tmp_path / "planted.cpp").write_text(text)
    program = built(tmp_path, "memory", tmp_path / "planted.cpp")
    path = given([(packed, x[:, 1:].contiguous(), torch.zeros(2, 9))], tmp_path)
    done = subprocess.run([str(program), str(path), str(tmp_path / "out"), "1"], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_damaged_chains_are_refused_or_harmless(program: Path, tmp_path: Path) -> None:
    """Numbers of header and steps replaced by others; the sanitizers see whatever the check lets through."""
    draw = random.Random(0)
    cases: list[Case] = []
    for seed in range(1500):
        steps = chain(seed % 60)
        packed = pack(steps, kernels().layout, FORMATS[seed % 4])
        numbers = packed[: (8 + 27 * len(steps.steps)) * 8].view(torch.int64)
        for _ in range(draw.choice([1, 1, 2])):
            place = draw.randrange(4, len(numbers))
            old = int(numbers[place])
            new = draw.choice([old + 1, old - 1, old * 2, -old, draw.randrange(200), 1 << 40, -(1 << 62), (1 << 63) - 1])
            numbers[place] = max(-(1 << 63), min(new, (1 << 63) - 1))
        cases.append((packed, torch.randn(3, steps.inputs), torch.randn(3, steps.outputs)))
    results = list(ran(program, cases, tmp_path, 2))
    refused = sum(y is None for y in results)
    assert 300 < refused < len(cases)
