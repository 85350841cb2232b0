"""Whole architectures on the torch target: nothing dense goes unlisted, and what is rewritten comes back from its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import registry
from rewriter.backends.files.pt2 import load_pt2
from rewriter.backends.fx.graph import FxGraph
from rewriter.graph import Site
from tests.files_zoo.zoo import ZOO, module, program
from tests.fx.models import obeys_law, same

FAST = ["bert", "distilbert", "gpt2", "vit", "convnext", "resnet", "timm_vit", "timm_swin"]
FAST += ["encoder", "tagger", "gru", "cnn", "mixer", "tied", "no_grad"]
REWRITTEN = ["gru", "no_grad", "cnn", "mixer"]


def marked(fast: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in ZOO]


def dense_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every weight that is one matrix, by its first name."""
    found = []
    for path, part in model.named_modules():
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D":
            found.append((f"{path}.weight", part.weight))
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            found.append((f"{path}.in_proj_weight", part.in_proj_weight))
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(part.kernel_size) == {1} and part.groups == 1:
            found.append((f"{path}.weight", part.weight))
    return found


def names_of(model: nn.Module, weight: Tensor) -> set[str]:
    return {name for name, other in model.named_parameters(remove_duplicate=False) if other is weight}


@pytest.mark.parametrize("name", marked(FAST))
def test_every_dense_weight_is_a_site(name: str) -> None:
    """Also where it is kept; one for each stored weight, tied ones once; and each site multiplies by what it says."""
    entry, model = ZOO[name], module(name)
    g = FxGraph.of(program(name))
    found = registry.sites(g)
    assert len({s.id for s in found}) == len(found)
    linears = [s for s in found if s.kind == "linear"]
    stored = {s.weights["weight"].name for s in linears}
    for path, weight in dense_parameters(model):
        assert names_of(model, weight) & stored, path
    layers = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.RNNBase)]
    inside = {f"{path}.{name}" for path, part in layers for name, p in part.named_parameters() if p.dim() == 2}
    assert inside <= stored and len(stored - inside) == entry.linears
    assert all(s.name and s.shape for s in linears)
    assert [[str(d).isdigit() for d in s.dims] for s in g.specs()] == [[isinstance(d, int) for d in s.dims] for s in entry.specs]
    feeds = entry.inputs(entry.other)
    for site in [s for s in linears if not s.reason][:: max(1, len(linears) // 4)]:
        obeys_law(g, site, feeds)


EXPECTED = {
    "bert": {"attention": 2}, "gpt2": {"attention": 2}, "t5": {"attention": 6}, "tagger": {"recurrence": 1}, "gru": {"recurrence": 1},
    "cnn": {}, "mixer": {}, "encoder": {"attention": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED])
def test_what_else_is_listed(name: str) -> None:
    g = FxGraph.of(program(name))
    kinds = [s.kind for s in registry.sites(g) if s.kind != "linear"]
    assert {kind: kinds.count(kind) for kind in kinds} == EXPECTED[name]


KEPT = {
    "gpt2": {"lm_head": "its weight is tied to transformer.wte"},
    "tied": {"encode": "reads the same numbers in another way", "encode[2]": "reads the same numbers in another way"},
    "resnet": {"resnet.encoder.stages.1.layers.0.shortcut.convolution": "a 1x1 convolution with strides [2, 2]"},
    "bert": {},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_says_why(name: str) -> None:
    g = FxGraph.of(program(name))
    kept: list[Site] = [s for s in registry.sites(g) if s.kind == "linear" and s.reason]
    assert {s.name for s in kept} == set(KEPT[name])
    assert all(KEPT[name][s.name] in s.reason for s in kept)


@pytest.mark.parametrize("name", marked(REWRITTEN))
def test_rewritten_and_reloaded(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    options: dict[str, Any] = {"objective": "params", "timing": False, "samples": 16, "cache": str(tmp_path / "cache"), "force": True}
    result = rewriter.rewrite(program(name), "low-rank:params=0.5", target="torch", **options)
    if name == "tied":
        assert result.exit_code == 1
        assert "reads the same numbers in another way" in result.message
        return
    assert result.exit_code == 0, result.message
    report = result.report
    assert report.matched["rewritten"] > 0
    assert report.output_error is not None
    assert math.isfinite(report.output_error.estimate)
    path = result.save(tmp_path / "out.pt2")
    reloaded = FxGraph(load_pt2(path))
    assert reloaded.output_names() == FxGraph(program(name)).output_names()
    assert [[isinstance(d, str) for d in s.dims] for s in reloaded.specs()] == [[isinstance(d, str) for d in s.dims] for s in entry.specs]
    assert not any("structured" in str(node.target) for node in reloaded.nodes() if node.op == "call_function")
    assert result.graph is not None
    done = {f"{row.name}.weight" for row in report.sites if row.status == "rewritten"}
    assert not done & set(reloaded.program.state_dict)
    for sizes in (entry.sizes, entry.other):
        feeds = entry.inputs(sizes)
        same(reloaded.run(feeds), result.graph.run(feeds))
    with torch.no_grad():
        outputs = result.module(**entry.inputs(entry.other))
    assert len(torch.utils._pytree.tree_leaves(outputs)) == len(reloaded.output_names())
