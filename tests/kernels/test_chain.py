"""The kernel equals its plain form: every format, instruction set and activation; odd sizes, single rows, threads; nothing else written."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewriter.backends.kernels import naive
from rewriter.backends.kernels.library import Kernels, compiler, cpu, kernels
from rewriter.backends.kernels.pack import FORMATS, pack
from rewriter.backends.kernels.plan import ACTIVATIONS, PAIR, Ending, Norm, Plan, Product, plan
from rewriter.errors import RewriteError
from rewriter.operator import AbstractMatrix
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.tolerances import EQUAL
from tests.kernels.spelled import in_4_bits, shuffled_blocks, spelled
from tests.onnx.models import close

LEVELS = ["native", "portable", *(["avx2"] if "avx2" in cpu() else [])]
FENCE = 64  # floats around an output that nobody may write


@pytest.fixture(params=LEVELS)
def library(request: pytest.FixtureRequest) -> Kernels:
    return kernels(request.param)


def ending(seed: int, width: int) -> Ending:
    """With and without each part."""
    rng = torch.Generator().manual_seed(seed)
    bias, gamma, beta = torch.randn(3, width, generator=rng)
    norm = Norm(gamma, beta, 1e-5) if seed % 5 == 0 else None
    return Ending(bias if seed % 3 else None, ACTIVATIONS[seed % len(ACTIVATIONS)], seed % 2 == 0, norm)


def ran(library: Kernels, steps: Plan, x: Tensor, weights: str = "float32", threads: int = 1, skip: Tensor | None = None) -> Tensor:
    """On outputs that were NaN, between fences."""
    room = torch.full((len(x) * steps.outputs + 2 * FENCE,), torch.nan)
    out = room[FENCE : len(room) - FENCE].view(len(x), steps.outputs)
    y = library.run(pack(steps, library.layout, weights), x, steps.outputs, threads, out, skip)
    assert y.data_ptr() == out.data_ptr()
    assert room[:FENCE].isnan().all() and room[len(room) - FENCE :].isnan().all()
    return y


def agree(found: Tensor, steps: Plan, x: Tensor, weights: str, skip: Tensor | None = None) -> None:
    """Rounding to int8 between two products may fall to the other side, where sums differ in the last place."""
    wanted = naive.run(steps, x, weights, skip)
    in_4_bits = any(isinstance(step, Product) and step.bits == 4 for step in steps.steps)
    if weights in ("float32", "weight8") and not in_4_bits:
        close(found, wanted)
    else:
        assert (found - wanted).norm() <= EQUAL[torch.bfloat16][0] * wanted.norm()


@pytest.mark.parametrize("chunk", range(10))
@pytest.mark.parametrize("weights", FORMATS)
def test_a_thousand_random_chains(library: Kernels, weights: str, chunk: int) -> None:
    for seed in range(100 * chunk, 100 * chunk + 100):
        operator, rng = spelled(seed), torch.Generator().manual_seed(seed)
        steps = plan(operator, ending(seed, operator.shape[0]))
        x, skip = (torch.randn(1 + seed % 14, width, generator=rng) for width in reversed(operator.shape))
        agree(ran(library, steps, x, weights, 1 + seed % 2, skip), steps, x, weights, skip)


@pytest.mark.parametrize("chunk", range(10))
def test_a_thousand_random_chains_in_4_bits(library: Kernels, chunk: int) -> None:
    products = 0
    for seed in range(100 * chunk, 100 * chunk + 100):
        operator, rng = spelled(seed, rows=PAIR), torch.Generator().manual_seed(seed)
        steps = in_4_bits(plan(operator, ending(seed, operator.shape[0])))
        products += sum(isinstance(step, Product) and step.bits == 4 for step in steps.steps)
        x, skip = (torch.randn(1 + seed % 14, width, generator=rng) for width in reversed(operator.shape))
        agree(ran(library, steps, x, "float32", 1 + seed % 2, skip), steps, x, "float32", skip)
    assert products > 100


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 64, 130), (3, 96, 64), (1, 128, 49)], ids=str)
def test_one_product_in_4_bits_is_exact_in_what_it_rounds_to(library: Kernels, shape: tuple[int, int, int]) -> None:
    k, q, p = shape
    steps = in_4_bits(plan(_diagonal(torch.randn(k, q, p, generator=torch.Generator().manual_seed(1)) / q**0.5)))
    for rows in (1, 3, 6, 7):
        x = torch.randn(rows, k * q, generator=torch.Generator().manual_seed(2))
        close(ran(library, steps, x), naive.run(steps, x))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 130), (3, 67, 64), (1, 129, 49)], ids=str)
def test_one_product_is_exact_in_what_it_rounds_to(library: Kernels, weights: str, shape: tuple[int, int, int]) -> None:
    k, q, p = shape
    steps = plan(_diagonal(torch.randn(k, q, p, generator=torch.Generator().manual_seed(1)) / q**0.5))
    x = torch.randn(7, k * q, generator=torch.Generator().manual_seed(2))
    close(ran(library, steps, x, weights), naive.run(steps, x, weights))


def _diagonal(blocks: Tensor) -> AbstractMatrix:
    from rewriter.algebra import BlockDiagonal

    return BlockDiagonal(blocks)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 6, 64, 97, 500])
def test_rows_and_threads_do_not_change_a_row(library: Kernels, rows: int, weights: str) -> None:
    """Bit by bit: large enough for both ways to share the work."""
    operator = Monarch(torch.randn(4, 96, 160) / 10, torch.randn(4, 160, 90) / 12, 384, 360)
    steps = plan(operator)
    x = torch.randn(rows, 384)
    alone = torch.cat([ran(library, steps, row[None], weights) for row in x[:9]])
    for threads in (1, 2, 3):
        assert ran(library, steps, x, weights, threads)[:9].equal(alone)
    agree(alone, steps, x[:9], weights)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("rows", [12, 13, 96, 99, 230])
def test_weights_in_parts_change_no_bit_of_a_row(switched: Kernels, library: Kernels, rows: int, weights: str) -> None:
    """More weights than the first cache holds, inputs in one run and in many; rows that fill tiles and groups of tiles, and do not."""
    switched.matrices(False)
    for operator in (LowRank(torch.randn(1400, 69) / 37, torch.randn(69, 30) / 8), shuffled_blocks(2, 700, 70)):
        steps = plan(operator, ending(3, operator.shape[0]))
        x, skip = torch.randn(rows, steps.inputs), torch.randn(rows, steps.outputs)
        found = ran(library, steps, x, weights, 1, skip)
        alone = [ran(library, steps, x[i : i + 1], weights, 1, skip[i : i + 1]) for i in (*range(14), rows - 1) if i < rows]
        assert torch.cat([found[: min(rows, 14)], found[-1:]]).equal(torch.cat(alone))
        agree(found, steps, x, weights, skip)


@pytest.fixture
def switched() -> Iterator[Kernels]:
    """Whose matrix registers may be switched off."""
    yield kernels()
    kernels().matrices(True)


def test_matrix_registers_change_no_bit(switched: Kernels) -> None:
    """Rows that fill none, some and all of them, with units and columns left over; without them vectors do all of it."""
    for seed in range(300):
        operator, rng = spelled(seed), torch.Generator().manual_seed(seed)
        steps = plan(operator, ending(seed, operator.shape[0]))
        x, skip = (torch.randn(1 + seed * 7 % 100, width, generator=rng) for width in reversed(operator.shape))
        assert not switched.matrices(False)
        wanted = ran(switched, steps, x, "int8", 1, skip)
        agree(wanted, steps, x, "int8", skip)
        switched.matrices(True)
        assert ran(switched, steps, x, "int8", 1 + seed % 2, skip).equal(wanted)


SHAPES = """
#include <immintrin.h>
extern "C" void shape(const void* to) { _tile_loadconfig(to); }
extern "C" void shaped(void* to) { _tile_storeconfig(to); }
extern "C" void release() { _tile_release(); }
"""


def test_matrix_registers_are_left_as_they_were(tmp_path: Path) -> None:
    """Others multiply on them as well, in the same thread."""
    if not kernels().matrices():
        pytest.skip("the CPU, its system or the compiler has no matrix registers: reading their shapes would be an illegal instruction")
    (tmp_path / "shapes.cpp").write_text(SHAPES)
    made = tmp_path / "shapes.so"
    subprocess.run([compiler(), "-shared", "-fPIC", "-mamx-tile", str(tmp_path / "shapes.cpp"), "-o", str(made)], check=True)
    library, ours, x = ctypes.CDLL(str(made)), plan(_diagonal(torch.randn(1, 96, 200))), torch.randn(64, 96)
    ran(kernels(), ours, x, "int8")  # from here on the system lets this process use them
    wanted = bytes([1, *[0] * 15, *[32, 0] * 8, *[0] * 16, *[7] * 8, *[0] * 8])  # palette 1; 7 rows of 32 bytes
    for given in (wanted, bytes(64)):
        library.shape(given) if given[0] else library.release()
        ran(kernels(), ours, x, "int8")
        found = ctypes.create_string_buffer(64)
        library.shaped(found)
        assert found.raw == given
    library.release()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(library: Kernels, activation: str) -> None:
    steps = plan(_diagonal(torch.eye(1)[None]), Ending(activation=activation))
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e18, -1e18])])[:, None]
    close(ran(library, steps, x), naive.run(steps, x))


def test_nan_and_infinity_show(library: Kernels) -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    for bad in (torch.nan, torch.inf):
        x = torch.randn(3, 40)
        x[1, 7] = bad
        for weights in FORMATS:
            y = ran(library, steps, x, weights)
            assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2].isfinite().all()


def test_zero_rows_and_zero_inputs(library: Kernels) -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    for weights in FORMATS:
        assert ran(library, steps, torch.randn(0, 40), weights).shape == (0, 33)
        assert not ran(library, steps, torch.zeros(2, 40), weights).any()


def test_leading_axes_and_strides() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    packed, x = pack(steps, kernels().layout), torch.randn(3, 40, 5).transpose(1, 2)
    close(kernels().run(packed, x, 33), naive.run(steps, x.contiguous()))


def test_wrong_inputs_are_refused() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    packed = pack(steps, kernels().layout)
    for x, outputs in ((torch.randn(2, 39), 33), (torch.randn(2, 40), 32), (torch.randn(2, 40).double(), 33)):
        with pytest.raises(RewriteError, match="maps 40 to 33 float32 numbers"):
            kernels().run(packed, x, outputs)
    for damaged, said in ((packed[:-64], "damaged"), (packed[:40], "no packed chain"), (packed[64:], "no packed chain")):
        with pytest.raises(RewriteError, match=said):
            kernels().run(damaged.clone(), torch.randn(2, 40), 33)


def test_what_is_added_has_to_be_there() -> None:
    packed = pack(plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)), Ending(skip=True)), kernels().layout)
    for skip in (None, torch.randn(2, 32), torch.randn(1, 33), torch.randn(2, 33).double()):
        with pytest.raises(RewriteError, match=r"adds \[2, 33\] float32 numbers"):
            kernels().run(packed, torch.randn(2, 40), 33, skip=skip)


def test_norms_of_large_means_and_of_constants(library: Kernels) -> None:
    gamma, beta = torch.randn(2, 33)
    steps = plan(_diagonal(torch.eye(33)[None]), Ending(norm=Norm(gamma, beta, 1e-5)))
    x = torch.cat([torch.randn(3, 33) + 100, torch.full((1, 33), 7.0)])
    close(ran(library, steps, x), naive.run(steps, x))


def test_chains_for_another_cpu_are_refused() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    others = [kernels(level).layout for level in LEVELS if kernels(level).layout != kernels().layout]
    for layout in others:
        with pytest.raises(RewriteError, match="another CPU"):
            kernels().run(pack(steps, layout), torch.randn(2, 40), 33)
    assert others or platform.machine() != "x86_64"


def test_a_library_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.backends.kernels import library

    path = library.build()
    monkeypatch.setattr(library, "_compile", lambda command: pytest.fail("compiled again"))
    assert library.build() == path


def test_what_stands_in_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rewriter.backends.kernels import library

    monkeypatch.setenv("REWRITER_KERNELS", "off")
    with pytest.raises(RewriteError, match="switched off by REWRITER_KERNELS=off"):
        library.build()
    monkeypatch.setenv("REWRITER_KERNELS", "sse")
    with pytest.raises(RewriteError, match="REWRITER_KERNELS=sse; allowed are native, avx2, portable, off"):
        library.build()
    monkeypatch.setenv("REWRITER_KERNELS", "")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    with pytest.raises(RewriteError, match=r"do not compile with .*: x\.cpp:1: error: no such thing"):
        library.build()
    assert not list(tmp_path.rglob("*.so*"))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(RewriteError, match=r"no C\+\+ compiler is there"):
        library.build()
