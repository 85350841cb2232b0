"""Block-LoRA that trains: both readings against their equations, the folded form against peft, and what cannot be split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.backends.tuning.block_lora import READINGS
from rewriter.errors import RewriteError
from rewriter.tolerances import EQUAL


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.head = nn.Linear(24, 24), nn.Sequential(nn.Linear(24, 40), nn.ReLU()), nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(torch.relu(self.first(x))))
        return out


X = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(1))


def same(found: Tensor, wanted: Tensor) -> None:
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def tuned(reading: str, **settings: Any) -> Any:
    """Trained for a few steps."""
    made = rewriter.block_lora(Small(), ["first", "0"], **{"rank": 4, "alpha": 6, "reading": reading, **settings})
    same(made.module(X), Small()(X))  # it starts as the base
    optimiser = torch.optim.Adam(made.parameters(), 0.05)
    for _ in range(5):
        optimiser.zero_grad()
        made.module(X).square().mean().backward()
        optimiser.step()
    assert (made.module(X) - Small()(X)).abs().max() > 100 * EQUAL[torch.float32][1]
    return made


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("reading", READINGS)
def test_the_equations(reading: str, blocks: int) -> None:
    """Written out in blocks; only the branches were trained."""
    made = tuned(reading, blocks=blocks)
    base, layer = Small().first, made.layers["first"]
    parts = [layer.down] * blocks
    if reading == "rank":
        a = torch.cat(parts)  # A_1 ... A_n along the rank, all alike
        b = torch.cat(list(layer.up), 1)
    else:
        a, b = torch.cat(parts, 1), layer.up[0]
    assert a.shape == (4, 24) and b.shape == (24, 4)
    same(layer(X), base(X) + 6 / 4 * X @ a.T @ b.T)
    down, up = layer.fold()
    assert len(down) == (4 // blocks if reading == "rank" else 4)
    same(up @ down, b @ a)
    for name, parameter in made.remove().named_parameters():
        assert parameter.equal(Small().get_parameter(name)) and not parameter.requires_grad
    assert set(made.layers) == {"first", "inner.0"}


@pytest.mark.parametrize("reading", READINGS)
def test_counts_are_the_formulas(reading: str) -> None:
    r, n, sizes = 8, 4, [(24, 24), (24, 40)]
    counts = rewriter.block_lora(Small(), ["first", "0"], rank=r, blocks=n, reading=reading).counts()
    assert counts.trained == sum(r * d // n + r * k for d, k in sizes)
    assert counts.lora == sum(r * (d + k) for d, k in sizes) and counts.lora_flops == 2 * counts.lora
    folded = [(d + k) * r // n for d, k in sizes]
    apart = [r * d // n + r * k for d, k in sizes]
    assert counts.deployed == sum(folded if reading == "rank" else apart)
    assert counts.flops == 2 * counts.deployed + (0 if reading == "rank" else sum(d - d // n for d, _ in sizes))


@pytest.mark.parametrize("reading", READINGS)
def test_saved_it_is_an_adapter_for_peft_and_for_us(reading: str, tmp_path: Path) -> None:
    made = tuned(reading)
    made.save(tmp_path / "lora")
    with torch.no_grad():
        wanted = made.module(X)
        theirs = peft.PeftModel.from_pretrained(Small(), str(tmp_path / "lora")).eval()
        same(theirs(X), wanted)
        assert len([m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]) == 2
        same(theirs.merge_and_unload()(X), wanted)
    result = rewriter.plan(Small().eval(), "merge-lora", inputs=("x:float32[batch,3,24]",), adapters=(str(tmp_path / "lora"),), samples=16)
    same(next(iter(result.graph.run({"x": X}).values())), wanted)  # type: ignore[union-attr]


def test_as_it_trains_it_is_exported_and_its_branch_is_read() -> None:
    """The sum of the blocks is a constant there: merge-lora folds it."""
    made = tuned("rank")
    result = rewriter.plan(made.module.eval(), "merge-lora", inputs=("x:float32[batch,3,24]",), samples=16)
    assert sum(row.kind == "adapter" and row.status == "planned" for row in result.report.sites) == 2
    same(next(iter(result.graph.run({"x": X}).values())), made.module(X))  # type: ignore[union-attr]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"targets": ["query"]}, "no module is called like query; linears are called first, inner.0, head"),
    "no linear": ({"targets": ["inner"]}, "'inner' is Sequential, not nn.Linear"),
    "reading": ({"reading": "rows"}, "reading='rows' is unknown; give one of rank, input"),
    "rank": ({"rank": 5}, "rank 5 in 2 blocks: give whole numbers from 1 on, of which blocks divides rank"),
    "features": ({"reading": "input", "blocks": 5}, "'first' reads 24 features, which 5 blocks do not divide"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_split_is_refused(what: str) -> None:
    settings, said = WRONG[what]
    module = Small()
    with pytest.raises(RewriteError, match=said):
        rewriter.block_lora(module, **{"targets": ["first"], **settings})
    assert all(p.requires_grad for p in module.parameters())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RewriteError, match="cannot be written"):
        tuned("rank").save(tmp_path / "file")
