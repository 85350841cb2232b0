"""The example structure: its mathematics against torch.kron, the laws of structures, and the whole job on it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import registry
from rewriter.moments import isotropic
from rewriter.operator import flatten, unflatten
from rewriter.structure import Fitted, NoMatch
from rewriter.tolerances import EQUAL, EXACT

CLOSE = EQUAL[torch.float32]
FP32 = EXACT[torch.float32]
FACTORS = [((6, 5), (8, 7)), ((3, 4), (5, 9)), ((2, 16), (24, 4)), ((1, 3), (12, 5)), ((7, 1), (4, 11))]
factors = pytest.mark.parametrize(("a", "b"), FACTORS, ids=str)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(a: tuple[int, int], b: tuple[int, int], terms: int, seed: int = 0) -> Tensor:
    """torch's own sum of Kronecker products."""
    draw = rng(seed)
    products = [torch.kron(torch.randn(*a, generator=draw), torch.randn(*b, generator=draw)) for _ in range(terms)]
    return torch.stack(products).sum(0)


@factors
@pytest.mark.parametrize("terms", [1, 2])
def test_it_is_torchs_kronecker_product(kronecker: Any, a: tuple[int, int], b: tuple[int, int], terms: int) -> None:
    weight = planted(a, b, terms)
    fit = kronecker.KroneckerStructure(*a, terms).fit(weight, isotropic(weight.shape[1]), weight.numel() * terms, rng())
    assert isinstance(fit, Fitted), fit
    assert fit.weighted_error <= FP32
    assert fit.operator.cost().params == terms * (prod(a) + prod(b))
    x = torch.randn(2, 3, weight.shape[1], generator=rng(1))
    assert torch.allclose(fit.operator.product(registry.eager_ops(), x), x @ weight.T, *CLOSE)


@factors
def test_planted_factors_are_discovered(kronecker: Any, a: tuple[int, int], b: tuple[int, int]) -> None:
    weight = planted(a, b, 1)
    found = kronecker.KroneckerStructure().discover(weight)
    assert isinstance(found, Fitted), found
    assert torch.linalg.norm(found.operator.dense() - weight) <= FP32 * torch.linalg.norm(weight)
    assert found.operator.cost().params <= prod(a) + prod(b)


@pytest.mark.parametrize("shape", [(48, 64), (37, 53), (96, 30)], ids=str)
def test_noise_is_not_discovered(kronecker: Any, shape: tuple[int, int]) -> None:
    found = kronecker.KroneckerStructure().discover(torch.randn(shape, generator=rng()))
    assert isinstance(found, NoMatch)
    assert found.reason


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (96, 30), (40, 101)], ids=str)
def test_fit_keeps_shape_and_limit_and_gains_by_more_numbers(kronecker: Any, shape: tuple[int, int]) -> None:
    weight, moments = torch.randn(shape, generator=rng()), isotropic(shape[1])
    errors = []
    for limit in (prod(shape) * part // 10 for part in (2, 4, 6, 8)):
        fit = kronecker.KroneckerStructure().fit(weight, moments, limit, rng())
        assert isinstance(fit, Fitted), fit
        assert fit.operator.shape == shape
        assert fit.operator.cost().params <= limit
        assert fit.weighted_error == pytest.approx(moments.error(weight, fit.operator.dense()), rel=FP32)
        errors.append(fit.weighted_error)
    assert errors == sorted(errors, reverse=True)


def test_refusals_have_their_reasons(kronecker: Any) -> None:
    moments, weight = isotropic(12), torch.randn(8, 12, generator=rng())
    tight = kronecker.KroneckerStructure(rows=4, columns=3, rank=2).fit(weight, moments, 39, rng())
    assert tight.reason == "kronecker:rows=4:columns=3:rank=2 stores at least 40 numbers, the limit is 39"
    none = kronecker.KroneckerStructure(rows=5).fit(weight, moments, 96, rng())
    assert "8 x 12" in none.reason
    weight[0, 0] = float("nan")
    assert "NaN" in kronecker.KroneckerStructure().fit(weight, moments, 96, rng()).reason
    assert "NaN" in kronecker.KroneckerStructure().discover(weight).reason


def test_operator_laws(kronecker: Any) -> None:
    operator = kronecker.Kronecker.random(rng())
    leaves, spec = flatten(operator)
    assert operator.cost().params == sum(leaf.numel() for leaf in leaves)
    assert operator.dense().shape == operator.shape
    again: Any = unflatten(spec, leaves)
    assert torch.equal(again.dense(), operator.dense())


class Block(nn.Module):
    """A linear that is a Kronecker product, and one that is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.planted, self.plain = nn.Linear(35, 48), nn.Linear(48, 20)
        with torch.no_grad():
            self.planted.weight.copy_(planted((6, 5), (8, 7), 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.plain(torch.relu(self.planted(x)))
        return out


@pytest.fixture(scope="module")
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_discovered_and_exported(kronecker: Any, block: nn.Module, target: str, tmp_path: Path) -> None:
    """`auto` has it as soon as it is imported, and the emitted file computes what the module did."""
    options = {"samples": 32, "timing": False, "force": True}  # the graph of so small a model outweighs its numbers
    result = rewriter.rewrite(block, "auto", ["x:float32[batch,35]"], target, **options)
    assert result.exit_code == 0, result.message
    rows = {row.name: row for row in result.report.sites}
    assert (rows["planted"].structure, rows["planted"].exact) == ("kronecker:rows=6:columns=5:rank=1", True)
    assert rows["plain"].status == "kept"
    x = torch.randn(9, 35, generator=rng(2))
    path = result.save(tmp_path / f"block{'.pt2' if target == 'torch' else '.onnx'}")
    emitted = registry.targets()[target]().open(path, 1)({"x": x})
    (y,) = emitted.values()
    assert torch.allclose(y, block(x), *CLOSE)
    assert torch.allclose(torch.as_tensor(result.module(x)), block(x), *CLOSE)


def test_listed_and_named(kronecker: Any) -> None:
    assert registry.structures()["kronecker"] is kronecker.KroneckerStructure
    (step,) = registry.parse_passes("kronecker:rows=4:rank=2:params=0.5")
    assert step.structure == kronecker.KroneckerStructure(rows=4, rank=2)
    assert step.spelling() == "kronecker:rows=4:rank=2:params=0.5"
