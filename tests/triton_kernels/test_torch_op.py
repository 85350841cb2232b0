"""A rewritten torch model in Triton gives what it gives without: every layer and recurrence that is covered, at any shape, compiled too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rewriter
from rewriter.backends.fx.custom_op import MAP, SITE
from rewriter.backends.kernels.plan import plan
from rewriter.backends.triton_kernels import chain, device, torch_op
from rewriter.errors import RewriteError
from rewriter.operator import flatten
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.low_rank import LowRank
from rewriter.pipeline import Result
from tests.detect.loops import CASES, exported
from tests.kernels.recurrent import inputs, wanted
from tests.kernels.test_session import Block
from tests.kernels.test_torch_op import planned
from tests.onnx.models import close


class Small(nn.Module):
    """One layer, and tensors that the program makes itself, on the device that it was traced on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.linear(x + torch.arange(32, dtype=x.dtype) / 32) + torch.ones(x.shape[1], 1, dtype=x.dtype).cumsum(0) / 8
        return made


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    return planned(Block())


def targets(module: nn.Module) -> list[object]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]  # type: ignore[union-attr]


def test_a_module_gives_what_it_gives_without_kernels(result: Result) -> None:
    module = torch_op.with_kernels(result.graph, "cpu")  # type: ignore[arg-type]
    for shape in ((1, 1, 32), (2, 9, 32)):
        x = torch.randn(shape)
        close(module(x), result.module(x).detach())


def test_every_layer_goes_along_with_what_follows(result: Result) -> None:
    module = torch_op.with_kernels(result.graph, "cpu")  # type: ignore[arg-type]
    assert targets(module).count(torch_op.CHAIN) == 6 and SITE not in targets(module)
    assert torch.ops.aten.gelu.default not in targets(module)
    assert {name for name, _ in module.named_parameters()} == {"norm.weight", "norm.bias"}
    assert not any(p.requires_grad for p in module.parameters())


def test_eight_bits_and_what_has_no_kernel() -> None:
    for passes, covered in (("monarch:blocks=4:rank=2,quantize", True), ("nm-sparse", False)):
        found = planned(Small(), passes)
        module, x = torch_op.with_kernels(found.graph, "cpu"), torch.randn(2, 3, 32)  # type: ignore[arg-type]
        close(module(x), found.module(x).detach())
        assert (torch_op.CHAIN in targets(module)) == covered


def test_doubles_stay_in_plain_aten() -> None:
    specs = ["x:float64[batch,time,32]"]
    found = rewriter.plan(Small().double().eval(), "monarch:blocks=4:rank=2", specs, timing=False, objective="params")
    module, x = torch_op.with_kernels(found.graph, "cpu"), torch.randn(2, 3, 32).double()  # type: ignore[arg-type]
    close(module(x), found.module(x).detach())
    assert torch_op.CHAIN not in targets(module)


def test_the_program_that_it_came_from_stays(result: Result) -> None:
    """A move to another device takes copies."""
    module = torch_op.with_kernels(result.graph, "cpu")  # type: ignore[arg-type]
    torch_op.move(module, torch.device("meta"))
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    assert module(torch.empty(2, 3, 32, device="meta")).shape == (2, 3, 40)
    x = torch.randn(1, 2, 32)
    assert result.module(x).isfinite().all()


def test_tensors_that_a_program_makes_move_along() -> None:
    module = torch_op.with_kernels(planned(Small()).graph, "cpu")  # type: ignore[arg-type]
    torch_op.move(module, torch.device("meta"))
    assert module(torch.empty(2, 3, 32, device="meta")).shape == (2, 3, 32)


BY_KEY = ("per key",)  # whose decays have no kernel


def test_a_device_that_stands_by_its_place_moves_too() -> None:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.to.device, (graph.placeholder("x"), torch.device("cpu"), torch.float32)))
    module = torch.fx.GraphModule(nn.Module(), graph)
    torch_op.move(module, torch.device("meta"))
    assert module(torch.zeros(2)).device.type == "meta"


@pytest.mark.parametrize("name", ["product", *BY_KEY])
def test_recurrences_of_whole_models(name: str) -> None:
    case = CASES[name]
    program = exported(case, True)
    found = rewriter.plan(program, "raise-recurrence", samples=16)
    assert found.graph is not None
    module = torch_op.with_kernels(found.graph, "cpu")
    assert (torch_op.RECUR in targets(module)) == (name not in BY_KEY) and MAP not in targets(module)
    for time in (1, 18):
        feeds = case.feeds(time)
        for one, expected in zip(module(*feeds.values()), program.module()(*feeds.values()), strict=True):
            close(one, expected)


def test_operators_are_ones_for_torch() -> None:
    factors, spec = chain.flatten(plan(LowRank(torch.randn(40, 20), torch.randn(20, 33))))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch_op.CHAIN, (torch.randn(2, 5, 40), factors, spec, 33), test_utils=tests)
    operator = LinearAttention(2, 5, 3, 2, 2)
    torch.library.opcheck(torch_op.RECUR, (inputs(operator, 2, 4, 0), [], flatten(operator)[1]), test_utils=tests)


def test_one_sequence_for_the_whole_batch() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2)
    xs = inputs(operator, 3, 4, 0)
    found = torch_op.RECUR([xs[0], xs[1][:1], *xs[2:]], [], flatten(operator)[1])
    for one, expected in zip(found, wanted(operator, [xs[0], xs[1][:1].expand(3, -1, -1), *xs[2:]]), strict=True):
        close(one, expected)


def test_recurrences_of_mixed_or_wide_numbers_stay_in_plain_aten() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2)
    xs = [x.double() for x in inputs(operator, 2, 4, 0)]
    for one, expected in zip(torch_op._map(xs, [], flatten(operator)[1], ""), wanted(operator, xs), strict=True):
        close(one.float(), expected)


def test_compiled_by_torch_as_it_stands(result: Result) -> None:
    """The operators are opaque to torch.compile, whole graphs stay whole."""
    module = torch_op.with_kernels(result.graph, "cpu")  # type: ignore[arg-type]
    x = torch.randn(2, 3, 32)
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


def test_the_device_is_asked_for_from_the_result(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RewriteError, match="sees no CUDA device"):
        result.with_kernels("cuda")
    with pytest.raises(RewriteError, match="there is no torch model to run with kernels: nothing"):
        Result(result.report, 1, "nothing was rewritten").with_kernels("cuda")


@pytest.mark.gpu
def test_on_a_device_eager_and_compiled(result: Result) -> None:
    module = result.with_kernels("cuda")
    for call in (module, torch.compile(module), torch.compile(module, mode="reduce-overhead")):
        for rows in (1, 9):
            x = torch.randn(rows, 7, 32)
            close(call(x.cuda()).cpu(), result.module(x).detach())
