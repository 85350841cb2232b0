"""A rewritten torch model with kernels gives what it gives without them; bias and activation go along; uncovered layers stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewriter
from rewriter.backends.kernels import torch_op
from rewriter.backends.kernels.library import kernels
from rewriter.backends.kernels.pack import pack
from rewriter.backends.kernels.plan import plan
from rewriter.errors import RewriteError
from rewriter.passes.structures.low_rank import LowRank
from rewriter.pipeline import Result
from tests.kernels.test_session import Block
from tests.onnx.models import close


def planned(module: nn.Module, passes: str = "monarch:blocks=4:rank=2") -> Result:
    inputs = ["x:float32[batch,time,32]"]
    return rewriter.plan(module.eval(), passes, inputs, timing=False, objective="params")


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    return planned(Block())


def test_a_module_gives_what_it_gives_without_kernels(result: Result) -> None:
    module = result.with_kernels()
    for shape in ((1, 1, 32), (3, 7, 32), (5, 40, 32)):
        x = torch.randn(shape)
        close(module(x), result.module(x).detach())


def test_every_layer_runs_in_a_kernel_with_what_follows(result: Result) -> None:
    module = result.with_kernels()
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets.count(torch_op.CHAIN) == 6
    assert torch.ops.aten.gelu.default not in targets
    assert sum(t is torch.ops.aten.add.Tensor for t in targets) < 6
    assert {name for name, _ in module.named_parameters()} == {"norm.weight", "norm.bias"}


def test_what_has_no_kernel_stays() -> None:
    torch.manual_seed(0)
    found = planned(Block(), "nm-sparse")
    x = torch.randn(2, 3, 32)
    close(found.with_kernels()(x), found.module(x).detach())


def test_the_operator_is_one_for_torch() -> None:
    steps = plan(LowRank(torch.randn(40, 20), torch.randn(20, 33)))
    packed = pack(steps, kernels().layout)
    arguments = (torch.randn(2, 5, 40), packed, 33)
    torch.library.opcheck(torch_op.CHAIN, arguments, test_utils=("test_schema", "test_faketensor"))


def test_other_models_are_one_line(result: Result) -> None:
    with pytest.raises(RewriteError, match="there is no torch model to run with kernels: nothing"):
        Result(result.report, 1, "nothing was rewritten").with_kernels()
