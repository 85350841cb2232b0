"""The recurrence kernel equals the step-by-step form: sizes, rules, instruction sets, threads, empty sequences, ONNX Runtime, torch."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import rewriter
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.kernels import naive
from rewriter.backends.kernels.covering import cover
from rewriter.backends.kernels.library import Kernels, kernels
from rewriter.backends.kernels.plan import NotCovered
from rewriter.backends.kernels.recurrences import Sizes, sizes_of
from rewriter.backends.kernels.session import check, coverage, open_covered
from rewriter.backends.kernels.torch_op import RECUR
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.measure import stacked_maps
from rewriter.backends.onnx.opaque import SPEC
from rewriter.backends.onnx.run import Session
from rewriter.errors import RewriteError
from rewriter.operator import AbstractRecurrence, flatten
from rewriter.passes.structures.diagonal_recurrence import DiagonalRecurrence
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.monarch_attention import MonarchAttention
from tests.detect.loops import CASES, exported
from tests.kernels.recurrent import given, inputs, recurrence, wanted
from tests.kernels.test_chain import LEVELS
from tests.kernels.test_sanitized import NATIVE, SANITIZERS, built
from tests.onnx.models import close

DRIVER = Path(__file__).parent / "sanitized_recurrence.cpp"


@pytest.fixture(params=LEVELS)
def library(request: pytest.FixtureRequest) -> Kernels:
    return kernels(request.param)


def ran(library: Kernels, operator: AbstractRecurrence, xs: list[Tensor], threads: int = 1) -> list[Tensor]:
    shapes = [y.shape for y in wanted(operator, xs)]
    return library.recur(sizes_of(operator), given(operator, xs), shapes, threads)


@pytest.mark.parametrize("chunk", range(6))
def test_three_hundred_random_recurrences(library: Kernels, chunk: int) -> None:
    for seed in range(50 * chunk, 50 * chunk + 50):
        operator = recurrence(seed)
        xs = inputs(operator, 1 + seed % 3, 1 + seed % 11, seed)
        for found, expected in zip(ran(library, operator, xs), wanted(operator, xs), strict=True):
            close(found, expected)


@pytest.mark.parametrize("seed", range(40))
def test_the_plain_form_is_the_same(seed: int) -> None:
    """By which the kernels are trusted before first use."""
    operator = recurrence(seed)
    xs = inputs(operator, 2, 3, seed)
    for found, expected in zip(naive.recurrence(sizes_of(operator), given(operator, xs)), wanted(operator, xs), strict=True):
        close(found, expected)


def test_a_kernel_of_matrices_that_is_off_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Kernels.recur
    monkeypatch.setattr(Kernels, "recur", lambda *args: [1.01 * y for y in whole(*args)])
    with pytest.raises(RewriteError, match="the kernels are off by"):
        check(kernels())


def test_torch_broadcasts_as_ever() -> None:
    operator = DiagonalRecurrence(6)
    decay, drive, state = inputs(operator, 3, 4, 0)
    found = RECUR([decay, drive[:1], state], [], flatten(operator)[1])
    for one, expected in zip(found, wanted(operator, [decay, drive[:1].expand(3, -1, -1), state]), strict=True):
        close(one, expected)


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    for seed in range(30):
        operator = recurrence(seed)
        xs = inputs(operator, 3, 9, seed)
        whole = ran(kernels(), operator, xs)
        for one, two in zip(whole, ran(kernels(), operator, xs, threads=2), strict=True):
            assert torch.equal(one, two)
        alone = ran(kernels(), operator, [x[1:2] for x in xs])
        assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_no_token_at_all_leaves_the_state() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2)
    xs = inputs(operator, 2, 0, 0)
    out, state = kernels().recur(sizes_of(operator), xs, [(2, 0, 6), (2, 2, 5, 3)])
    assert out.numel() == 0 and torch.equal(state, xs[-1])


def test_what_is_not_finite_stays_so() -> None:
    """In its own head and from its token on; nowhere else."""
    operator = LinearAttention(2, 5, 3, 2, 2)
    xs = inputs(operator, 1, 4, 0)
    xs[1][0, 2, :5] = torch.nan
    out, state = ran(kernels(), operator, xs)
    assert out[0, 2:, :3].isnan().all() and not out[0, :2].isnan().any() and not out[0, :, 3:].isnan().any()
    assert state[0, 0].isnan().all() and not state[0, 1].isnan().any()


def test_inputs_that_do_not_fit_are_refused() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2)
    xs, shapes = inputs(operator, 2, 4, 0), [(2, 4, 6), (2, 2, 5, 3)]
    wrong = [
        ([x.double() for x in xs], shapes),
        (xs[:-1], shapes),
        ([*xs[:-1], xs[-1][:1]], shapes),
        ([xs[0], xs[1][:, :3], *xs[2:]], shapes),
        (xs, [(2, 4, 5), shapes[1]]),
    ]
    for tensors, outputs in wrong:
        with pytest.raises(RewriteError, match="the kernel does not take"):
            kernels().recur(sizes_of(operator), tensors, outputs)


UNSOUND = (
    *({name: value} for name in ("heads", "key", "width", "queries", "keys", "factors") for value in (0, -1, 1 << 40)),
    *({name: 2} for name in ("kind", "delta", "stored", "read", "carried")),
    *({"decay": 3}, {"decay": -1}, {"stored": 1, "decay": 0}, {"keys": 3}, {"queries": 3, "heads": 4}, {"key": 5000}),
    *({"heads": 1 << 10, "key": 1 << 11}, {"width": 1 << 20, "heads": 2}, {"factors": 1 << 19}),
)


@pytest.mark.parametrize("change", UNSOUND, ids=str)
def test_sizes_that_do_not_fit_together_are_refused(change: dict[str, int]) -> None:
    sound = Sizes(1, heads=4, width=8, key=8, queries=4, keys=4)
    assert kernels().takes(sound) and not kernels().takes(dataclasses.replace(sound, **change))  # type: ignore[arg-type]
    operator = LinearAttention(2, 5, 3, 2, 2)
    with pytest.raises(RewriteError, match="the kernel does not take"):
        kernels().recur(dataclasses.replace(sizes_of(operator), **change), inputs(operator, 1, 1, 0), [(1, 1, 6), (1, 2, 5, 3)])  # type: ignore[arg-type]


def test_other_maps_are_left_alone() -> None:
    with pytest.raises(NotCovered, match="no kernel for MonarchAttention"):
        sizes_of(MonarchAttention.random(torch.Generator().manual_seed(0)))


def model(operator: AbstractRecurrence) -> ir.Model:
    return stacked_maps([operator])


def lying(change: str) -> ir.Model:
    """A recurrence of which something is not as its spec says."""
    found = model(LinearAttention(2, 5, 3, 2, 2))
    (node,) = found.graph
    match change:
        case "a width":
            node.inputs[1].shape = ir.Shape(["batch", "time", 11])  # type: ignore[union-attr]
        case "one for the batch":
            node.inputs[1].shape = ir.Shape([1, "time", 10])  # type: ignore[union-attr]
        case "a decay":
            node.metadata_props[SPEC] = node.metadata_props[SPEC].replace('"decay":""', '"decay":"foo"')
        case "a number":
            node.metadata_props[SPEC] = node.metadata_props[SPEC].replace('"heads":2', f'"heads":{1 << 70}')
        case "a rank":
            node.inputs[0].shape = ir.Shape(["batch", 10])  # type: ignore[union-attr]
        case "no shape":
            node.inputs[2].shape = None  # type: ignore[union-attr]
        case "a missing input":
            node.resize_inputs(4)
        case "an output":
            node.resize_outputs(3)
        case "sizes":
            node.metadata_props[SPEC] = node.metadata_props[SPEC].replace('"keys":2', '"keys":7')
        case "a size":
            node.metadata_props[SPEC] = node.metadata_props[SPEC].replace('"scale":1.0', '"scale":"x"')
    return found


@pytest.mark.parametrize(
    "change",
    ["a width", "one for the batch", "a decay", "a number", "a rank", "no shape", "a missing input", "an output", "sizes", "a size"],
)
def test_a_node_that_lies_is_left_to_stock_operators(change: str) -> None:
    """As it was, and in words."""
    found = lying(change)
    before = [(n.op_type, len(n.inputs), len(n.outputs)) for n in found.graph]
    (covered,) = cover(found, kernels(), 1)
    assert covered.reason and [(n.op_type, len(n.inputs), len(n.outputs)) for n in found.graph] == before


@pytest.mark.parametrize("seed", range(24))
def test_a_session_runs_it(seed: int) -> None:
    """At several lengths and batches, with the state as it was named."""
    operator = recurrence(seed)
    covered = model(operator)
    (found,) = cover(covered, kernels(), 2)
    assert not found.reason and [n.op_type for n in covered.graph] == ["Recurrence"]
    session = Session(ir.to_proto(covered).SerializeToString(), 2, library=str(kernels().path))
    for batch, time in ((1, 1), (2, 7), (3, 0)):
        xs = inputs(operator, batch, time, seed)
        y = session({value.name or "": x for value, x in zip(covered.graph.inputs, xs, strict=True)})
        for one, expected in zip(y.values(), wanted(operator, xs) if time else (), strict=bool(time)):
            close(one, expected)


def test_a_file_whose_shapes_lie_ends_in_an_error() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2)
    covered = model(operator)
    cover(covered, kernels(), 1)
    for value in covered.graph.inputs:
        value.shape = ir.Shape([None] * len(value.shape or ()))
    session = Session(ir.to_proto(covered).SerializeToString(), 1, library=str(kernels().path))
    xs = inputs(operator, 2, 4, 0)
    for place, x in ((1, xs[1][:, :3]), (2, xs[2][..., :5]), (4, xs[4][:1]), (0, xs[0][:1])):
        wrong = [x if i == place else old for i, old in enumerate(xs)]
        with pytest.raises(Exception, match="an input of a Recurrence has another shape than its sizes say"):
            session({value.name or "": x for value, x in zip(covered.graph.inputs, wrong, strict=True)})
    (node,) = covered.graph
    node.attributes["keys"] = ir.AttrInt64("keys", 7)
    with pytest.raises(Exception, match="sizes of a Recurrence that do not fit together"):
        Session(ir.to_proto(covered).SerializeToString(), 1, library=str(kernels().path))


@pytest.mark.parametrize("machine", [NATIVE, ()], ids=["native", "portable"])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_nothing_else_is_read_or_written(sanitizer: str, machine: tuple[str, ...], tmp_path: Path) -> None:
    """Each tensor in memory of just its size, two tasks at once, under the sanitizers; panels wide and narrow."""
    program = built(tmp_path, sanitizer, DRIVER, "recurrence.cpp", machine)
    cases = [(recurrence(seed), inputs(recurrence(seed), 1 + seed % 2, 1 + seed % 5, seed)) for seed in range(60)]
    with (tmp_path / "cases").open("wb") as file:
        for operator, xs in cases:
            file.write(sizes_of(operator).packed() + struct.pack("qq", *xs[0].shape[:2]))
            file.write(b"".join(x.contiguous().numpy().tobytes() for x in given(operator, xs)))
    done = subprocess.run([str(program), str(tmp_path / "cases"), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32)
    for operator, xs in cases:
        for expected in wanted(operator, xs):
            close(numbers[: expected.numel()].view(expected.shape), expected)
            numbers = numbers[expected.numel() :]
    assert not numbers.numel()


RAISED = [name for name, case in CASES.items() if case.kind in ("LinearAttention", "Retention", "DiagonalRecurrence")]


@pytest.mark.parametrize("name", RAISED)
def test_whole_models(name: str, tmp_path: Path) -> None:
    """Read from a program's loop: the file under both sessions, and the torch module, give what the model gives."""
    case, out = CASES[name], tmp_path / "m.onnx"
    program = exported(case, True)
    result = rewriter.rewrite(program, "raise-recurrence", target="onnxruntime", out=str(out), samples=16, timing=False)
    assert result.exit_code == 0
    assert {(c.kind, c.reason) for c in coverage(out)} == {(case.kind, "")}
    module = rewriter.plan(program, "raise-recurrence", samples=16).with_kernels()
    assert RECUR in [node.target for node in module.graph.nodes]
    stock, fast = Session(str(out), 1), open_covered(out, 2)
    for time in (1, 3, 40):
        feeds = case.feeds(time)
        expected = program.module()(*feeds.values())
        feeds = dict(zip((spec.name for spec in OnnxGraph(load_onnx(out)).specs()), feeds.values(), strict=True))
        for found in (list(stock(feeds).values()), list(fast(feeds).values()), module(*feeds.values())):
            for one, wanted_ in zip(found, expected, strict=True):
                close(one, wanted_)
