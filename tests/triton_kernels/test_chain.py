"""Chains in Triton equal their plain form: every structure, dtype, activation and way to cut; nothing else is read or written."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Dense, Sparse
from rewriter.backends.eager import EagerOps
from rewriter.backends.kernels import naive
from rewriter.backends.kernels.plan import ACTIVATIONS, Copy, Ending, Finish, NotCovered, Plan, Product, Step, plan
from rewriter.backends.triton_kernels import chain, tuning
from rewriter.backends.triton_kernels.tuning import Tiles
from rewriter.errors import RewriteError
from rewriter.operator import AbstractMatrix
from rewriter.passes.structures.low_rank import LowRank
from rewriter.quantised import quantised
from rewriter.registry import load_structures
from rewriter.tolerances import EQUAL
from tests.kernels.spelled import spelled
from tests.onnx.models import close

load_structures()
FENCE = 64  # numbers around a tensor that nobody may write, and that spoil what reads them


def fenced(x: Tensor, fence: float = torch.nan) -> Tensor:
    """The same numbers between fences: NaN, or the largest where there is none."""
    room = torch.full((x.numel() + 2 * FENCE,), fence if x.is_floating_point() else torch.iinfo(x.dtype).max, dtype=x.dtype)
    inside = room[FENCE : FENCE + x.numel()].view(x.shape)
    return inside.copy_(x)


def fences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both fences around a fenced tensor of floats."""
    return x.as_strided((FENCE,), (1,), 0), x.as_strided((FENCE,), (1,), FENCE + x.numel())


def poisoned(steps: Plan) -> Plan:
    """The plan on fenced tensors."""
    tensors, spec = chain.flatten(steps)
    return chain.unflatten([fenced(tensor) for tensor in tensors], spec)


def ran(steps: Plan, x: Tensor) -> Tensor:
    """Everything fenced, outputs NaN before and in fences of a number, so that a NaN behind their end shows."""
    out = fenced(torch.full((len(x), steps.outputs), torch.nan, dtype=x.dtype), 7.0)
    y = chain.run(poisoned(steps), fenced(x), out)
    assert y.data_ptr() == out.data_ptr() and all((fence == 7).all() for fence in fences(out))
    return y


def ending(seed: int, width: int) -> Ending:
    bias = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Ending(bias if seed % 3 else None, ACTIVATIONS[seed % len(ACTIVATIONS)])


def members() -> list[type[AbstractMatrix]]:
    """Every structure that is found and is spelled with products and permutations alone."""
    own = [kind for kind in AbstractMatrix.kinds.values() if kind.__module__.startswith("rewriter.")]
    return [kind for kind in own if issubclass(kind, AbstractMatrix) and _covered(kind)]


def _covered(kind: type[AbstractMatrix]) -> bool:
    try:
        chain.flatten(plan(kind.random(torch.Generator().manual_seed(0))))
    except NotCovered:
        return False
    return True


def test_the_family_is_all_there() -> None:
    assert {"LowRank", "PivotedLowRank", "BlockDense", "Monarch", "BlockDiagonal", "Dense", "Quantised"} <= {k.__name__ for k in members()}


@pytest.mark.parametrize("chunk", range(4))
def test_random_chains(chunk: int) -> None:
    for seed in range(9 * chunk, 9 * chunk + 9):
        operator = spelled(seed, widest=50, sparse=False)
        steps = plan(operator, ending(seed, operator.shape[0]))
        x = torch.randn(1 + seed % 19, operator.shape[1], generator=torch.Generator().manual_seed(seed))
        close(ran(steps, x), naive.run(steps, x))


@pytest.mark.parametrize("dtype", chain.DTYPES, ids=str)
@pytest.mark.parametrize("kind", members(), ids=lambda kind: kind.__name__)
def test_every_structure_in_every_dtype(kind: type[AbstractMatrix], dtype: torch.dtype) -> None:
    operator = kind.random(torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(3, operator.shape[1]).to(dtype) / 4
    wanted = operator.to(torch.float32).product(EagerOps(), x.float()) if kind.__name__ != "Quantised" else _inside(operator, x)
    close(ran(plan(operator), x), wanted.to(dtype))


def _inside(operator: AbstractMatrix, x: Tensor) -> Tensor:
    """With the weights that the integers stand for, and inputs as they are."""
    return operator.inside.to(torch.float32).product(EagerOps(), x.float())  # type: ignore[attr-defined, no-any-return]


def exact(steps: Plan) -> Plan:
    """The same with weights of integers multiplied out."""

    def multiplied(step: Step) -> Step:
        if not isinstance(step, Product) or step.scale is None:
            return step
        return dataclasses.replace(step, weight=step.weight * step.scale, scale=None)

    return dataclasses.replace(steps, steps=tuple(map(multiplied, steps.steps)))


@pytest.mark.parametrize("seed", range(6))
def test_weights_of_eight_bits(seed: int) -> None:
    """A scale for each block and column, bias and activation behind it; inputs are not rounded."""
    rng = torch.Generator().manual_seed(seed)
    operator = quantised(BlockDiagonal(torch.randn(3, 5 + 7 * seed, 2 + 5 * seed, generator=rng)))
    assert operator is not None
    steps = plan(operator, ending(seed, operator.shape[0]))
    x = torch.randn(1 + 3 * seed, operator.shape[1], generator=rng)
    close(ran(steps, x), naive.run(exact(steps), x))


@dataclasses.dataclass(frozen=True)
class Cut:
    """A product without its last column."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        k, q, p = self.weight.shape
        return k * p - 1, k * q

    def product(self, ops: object, x: Tensor) -> Tensor:
        made: Tensor = ops.split(ops.block_matmul(x, self.weight), [self.shape[0], 1])[0]  # type: ignore[attr-defined]
        return made


@pytest.mark.parametrize("tiles", [Tiles(16, 16, 16, split=3), Tiles(16, 32, 64, split=2), Tiles(32, 64, 16)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 40, 19), (3, 67, 33)], ids=str)
def test_every_way_to_cut(tiles: Tiles, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tiles and many, sums split among programs, some of which have nothing to add; the last column is not wanted."""
    monkeypatch.setattr(chain, "INTERPRETED", (tiles,))
    k, q, p = shape
    rng = torch.Generator().manual_seed(q)
    cut = Cut(torch.randn(k, q, p + 1, generator=rng) / q**0.5)
    steps = plan(cut, Ending(torch.randn(cut.shape[0], generator=rng), "silu"))  # type: ignore[arg-type]
    for rows in (1, 37):
        x = torch.randn(rows, k * q, generator=rng)
        close(ran(steps, x), naive.run(steps, x))


def test_tiles_in_groups_are_each_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles of rows than go together, and a last group that is not full."""
    monkeypatch.setattr(chain, "GROUP", 2)
    steps = plan(BlockDiagonal(torch.randn(1, 9, 40) / 3))
    x = torch.randn(80, 9)
    close(ran(steps, x), naive.run(steps, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    """Also where they overflow; NaN stays NaN."""
    rtol, atol = EQUAL[torch.float32]
    steps = plan(BlockDiagonal(torch.eye(1)[None]), Ending(activation=activation))
    x = torch.cat([torch.linspace(-100, 100, 201), torch.tensor([0.0, -0.0, 1e-30, 1e18, -1e18, torch.nan])])[:, None]
    torch.testing.assert_close(ran(steps, x), naive.run(steps, x), rtol=rtol, atol=atol, equal_nan=True)


def test_endings_of_what_several_steps_write() -> None:
    """An ending as a step of its own, behind copies; padding is copied as zeros."""
    index = torch.tensor([0, 2, 2, 5, 5, 1])
    bias = torch.randn(8)
    steps = plan(Twice(torch.randn(1, 4, 6), index), Ending(bias, "gelu"))  # type: ignore[arg-type]
    assert {type(step) for step in steps.steps} == {Product, Copy, Finish}
    x = torch.randn(3, 4)
    close(ran(steps, x), naive.run(steps, x))


@dataclasses.dataclass(frozen=True)
class Twice:
    """A product some columns of which are wanted twice, with zeros behind."""

    weight: Tensor
    index: Tensor
    shape: tuple[int, int] = (8, 4)

    def product(self, ops: object, x: Tensor) -> Tensor:
        made: Tensor = ops.pad(ops.gather(ops.block_matmul(x, self.weight), self.index), 8)  # type: ignore[attr-defined]
        return made


def test_rows_far_apart_and_leading_axes() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    wide, turned, columns = torch.randn(2, 3, 50)[..., 4:44], torch.randn(3, 40, 5).transpose(1, 2), torch.randn(40, 5).T
    for x in (wide, turned, columns, torch.randn(40), torch.randn(0, 40), torch.randn(2, 0, 40)):
        y = chain.run(steps, x)
        assert y.shape == (*x.shape[:-1], 33)
        close(y, naive.run(steps, x.reshape(-1, 40)).reshape(y.shape))


def test_weights_that_lie_otherwise() -> None:
    operator = LowRank(torch.randn(20, 40).T, torch.randn(33, 20).T)
    x = torch.randn(3, 40)
    close(ran(plan(operator), x), x @ operator.dense().T)
    tensors, spec = chain.flatten(plan(operator))
    close(chain.run(chain.unflatten(tensors, spec), x), x @ operator.dense().T)


def test_nan_stays_in_its_row() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    y = ran(steps, x)
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


def test_wrong_inputs_are_refused() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    for x in (torch.randn(2, 39), torch.randn(2, 40).double(), torch.tensor(1.0)):
        with pytest.raises(RewriteError, match="this chain takes 40 numbers, each float32, float16, bfloat16"):
            chain.run(steps, x)


def test_what_is_added_behind_a_product_is_not_covered() -> None:
    with pytest.raises(NotCovered, match="sums and norms behind a product"):
        chain.flatten(plan(LowRank(torch.randn(4, 2), torch.randn(2, 3)), Ending(skip=True)))


def test_sparse_weights_and_4_bits_are_not_covered() -> None:
    with pytest.raises(NotCovered, match="N:M sparse weights have no kernel for a GPU"):
        chain.flatten(plan(Sparse.of(torch.randn(8, 3), 2, 4)))
    made = quantised(Dense(torch.randn(32, 3)), 4)
    assert made is not None
    with pytest.raises(NotCovered, match="weights of 4 bits have no kernel for a GPU"):
        chain.flatten(plan(made))


def test_a_plan_travels_as_tensors_and_text() -> None:
    steps = plan(spelled(3, sparse=False), ending(4, spelled(3, sparse=False).shape[0]))
    tensors, spec = chain.flatten(steps)
    again, spec2 = chain.flatten(chain.unflatten(tensors, spec))
    assert spec == spec2 and all(a is b for a, b in zip(tensors, again, strict=True))


def test_the_fastest_tiles_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed once for rows about as many; what does not fit a chip is not taken."""
    asked: list[Tiles] = []
    seconds = {tuning.FEW[0]: 3.0, tuning.FEW[1]: 1.0, tuning.FEW[2]: float("inf")}
    monkeypatch.setattr(tuning, "_FASTEST", {})
    monkeypatch.setattr(tuning, "_seconds", lambda call: (asked.append(call.args[0]), seconds[call.args[0]])[1])
    for _ in range(2):
        assert tuning.fastest("key", list(seconds), lambda tiles: None) == tuning.FEW[1]
    assert asked == list(seconds)
    assert tuning.fastest("other", [tuning.FEW[2]], lambda tiles: None) == tuning.FEW[2] and len(asked) == 3


def test_no_timing_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_FASTEST", {})
    monkeypatch.setattr(tuning, "_seconds", lambda call: pytest.fail("timed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.fastest("key", tuning.MANY, lambda tiles: None) == tuning.MANY[0]


def test_choices_suit_the_product() -> None:
    """The list for few rows or many; never a split that leaves programs without work, nor columns mostly masked."""
    assert [tuning.about(n) for n in (1, 16, 17, 100, 10**6)] == [16, 16, 32, 128, 4096]
    for rows, q, p in ((1, 4096, 4096), (16, 64, 8), (17, 100, 100), (4096, 64, 4096)):
        found = tuning.choices(rows, q, p)
        assert {t.rows == 16 for t in found} == {rows <= 16}
        assert all((t.split - 1) * t.reduced < q and t.columns < 2 * max(p, 16) for t in found[1:])
    assert any(t.split > 1 for t in tuning.choices(1, 4096, 1024)) and any(t.columns == 256 for t in tuning.choices(512, 4096, 4096))
