"""The attention kernel equals the operator: sizes, masks, layouts, instruction sets, threads, what is not finite, ONNX Runtime, damage."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.kernels.covering import DOMAIN, attention_node, cover
from rewriter.backends.kernels.heads import Heads, heads_of
from rewriter.backends.kernels.library import Kernels, kernels
from rewriter.backends.kernels.plan import NotCovered
from rewriter.backends.kernels.session import check, coverage, open_covered
from rewriter.backends.onnx.measure import stacked_maps
from rewriter.backends.onnx.opaque import SPEC
from rewriter.backends.onnx.run import Session
from rewriter.errors import RewriteError
from rewriter.passes.structures.attention import Attention
from rewriter.registry import eager_ops
from tests.kernels.test_chain import LEVELS
from tests.kernels.test_sanitized import NATIVE, SANITIZERS, built
from tests.onnx.models import close
from tests.onnx.test_attention import agrees
from tests.structures.attentions import FORMS, inputs

DRIVER = Path(__file__).parent / "sanitized_attention.cpp"


@pytest.fixture(params=LEVELS)
def library(request: pytest.FixtureRequest) -> Kernels:
    return kernels(request.param)


@dataclass(frozen=True)
class Case:
    """An attention, its tensors (batch, heads, time, width), and the mask as it is added."""

    operator: Attention
    given: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None

    def wanted(self) -> Tensor:
        """By the operator, in float64."""
        beside = [] if self.mask is None else [self.mask.double()]
        (y,) = self.operator.apply(eager_ops(), *(x.double() for x in self.given), *beside)
        return y.float()  # type: ignore[no-any-return]

    def ran(self, library: Kernels, turned: int = 0, threads: int = 1) -> Tensor:
        """By the kernel, of tensors that lie so."""
        sizes = replace(heads_of(self.operator), turned=turned)
        lying = [x.transpose(1, 2) if sizes.is_turned(name) else x for name, x in zip(("query", "key", "value"), self.given, strict=True)]
        y = library.attend(sizes, *lying, self.mask, threads)  # type: ignore[misc]
        return y.transpose(1, 2) if sizes.is_turned("output") else y


def case(seed: int) -> Case:
    """Grouped heads, causal and not, masks of every shape that broadcasts, keys fewer and more than queries."""
    draw, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    shared, group = draw.choice([1, 2, 3]), draw.choice([1, 1, 2, 4])
    heads, key, width = shared * group, draw.choice([1, 5, 16, 32, 64, 80]), draw.choice([1, 5, 16, 33, 64, 70, 130])
    batch, time = draw.choice([1, 2, 3]), draw.choice([1, 2, 5, 6, 7, 13, 97, 130])
    keys, causal = draw.choice([time, 1, 3, 16, 17, 64, 65, 150]), draw.random() < 0.4
    dims: Any = (draw.choice(["batch", 1]), draw.choice([heads, 1]), draw.choice(["time", 1]), draw.choice(["keys", "keys", 1]))
    masked = draw.random() < 0.6
    operator = Attention(heads, shared, key, width, draw.choice([1.0, 0.3]), causal, dims if masked else ())
    sizes = {"batch": batch, "time": time, "keys": keys}
    mask = torch.randn([sizes.get(d, d) for d in dims], generator=rng) if masked else None
    shapes = ((batch, heads, time, key), (batch, shared, keys, key), (batch, shared, keys, width))
    q, k, v = (torch.randn(shape, generator=rng) for shape in shapes)
    return Case(operator, (q, k, v), mask)


@pytest.mark.parametrize("chunk", range(6))
def test_three_hundred_random_ones(library: Kernels, chunk: int) -> None:
    for seed in range(50 * chunk, 50 * chunk + 50):
        given = case(seed)
        close(given.ran(library, seed % 16, 1 + seed % 2), given.wanted())


def test_neither_threads_nor_layouts_nor_neighbours_change_a_bit() -> None:
    for seed in range(40):
        given = case(seed)
        whole = given.ran(kernels())
        assert whole.equal(given.ran(kernels(), 15, 2))
        q, k, v = given.given
        mask = given.mask if given.mask is None or len(given.mask) == 1 else given.mask[:1]
        assert whole[:1].equal(Case(given.operator, (q[:1], k[:1], v[:1]), mask).ran(kernels()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_head(library: Kernels, value: float) -> None:
    operator = Attention(2, 2, 5, 3, 0.5)
    q, k, v = torch.randn(1, 2, 9, 5), torch.randn(1, 2, 20, 5).abs(), torch.randn(1, 2, 20, 3)
    q[0, 1, 4], k[0, 1, 18] = 1.0, value
    given = Case(operator, (q, k, v), None)
    found = given.ran(library)
    assert found[0, 1, 4].isnan().all() and found[0, 0].isfinite().all() and torch.equal(found[0, 0].isnan(), given.wanted()[0, 0].isnan())


@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_queries_that_see_nothing(library: Kernels, empty: str) -> None:
    mask = torch.zeros(1, 1, 7, 21)
    mask[0, 0, 3] = mask[0, 0, 4, :20] = -torch.inf
    operator = replace(Attention(2, 1, 5, 3, 0.5, mask=(1, 1, "time", "keys")), empty=empty)
    q, k, v = torch.randn(1, 2, 7, 5), torch.randn(1, 1, 21, 5), torch.randn(1, 1, 21, 3)
    found = Case(operator, (q, k, v), mask).ran(library)
    assert (found[0, :, 3] == 0).all() if empty == "zero" else found[0, :, 3].isnan().all()
    close(found[0, :, 4], v[0, :, 20].expand(2, -1))


def test_nothing_at_all() -> None:
    q, k = torch.randn(2, 2, 0, 5), torch.randn(2, 2, 4, 5)
    assert kernels().attend(Heads(2, 2, 5, 5, 1.0), q, k, k).shape == (2, 2, 0, 5)
    assert kernels().attend(Heads(2, 2, 5, 5, 1.0), q[:0], k[:0], k[:0]).shape == (0, 2, 0, 5)
    found = kernels().attend(Heads(2, 2, 5, 5, 1.0), k, k[:, :, :0], k[:, :, :0])
    assert (found == 0).all()  # a sum of nothing


WRONG = {"heads": 0, "shared": 3, "key": 1 << 40, "width": -1, "turned": 16}


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_do_not_fit_together_are_refused(name: str) -> None:
    sound = Heads(4, 2, 8, 8, 1.0)
    wrong = replace(sound, **{name: WRONG[name]})  # type: ignore[arg-type]
    assert kernels().takes(sound) and not kernels().takes(wrong)
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(RewriteError, match="the kernel does not take"):
        kernels().attend(wrong, q, k, k)


def test_inputs_that_do_not_fit_are_refused() -> None:
    sizes, q, k = Heads(4, 2, 8, 8, 1.0), torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    wrong: list[Sequence[Tensor | None]] = [
        (q.double(), k, k), (q, k[:1], k[:1]), (q, k, k[:, :, :3]), (q[:, :3], k, k), (q, k[..., :4], k),
        (q, k, k, torch.zeros(2, 1, 1, 4)), (q, k, k, torch.zeros(1, 1, 1, 5).double()), (q, k, k, torch.zeros(3, 5)),
    ]  # fmt: skip
    for tensors in wrong:
        with pytest.raises(RewriteError, match="the kernel does not take"):
            kernels().attend(sizes, *tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMS)
def test_a_session_runs_every_form(name: str) -> None:
    """With masks that are boolean, added, both; rows that see nothing among them."""
    form = FORMS[name]
    model = stacked_maps([form])
    (found,) = cover(model, kernels(), 2)
    assert not found.reason and (DOMAIN, "Attention") in {(n.domain, n.op_type) for n in model.graph}
    for time, keys in [(4, 6), (1, 5), (7, 3)]:
        agrees(form, model, inputs(form, time, keys, dtype=torch.float32), str(kernels().path))


class Block(nn.Module):
    """(batch, seq, 24) -> the same; `both`: heads are read beside the attention as well."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.both, self.mix, self.out = both, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, 6)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        seen = y.transpose(1, 2).flatten(2)
        made: Tensor = self.out(seen)
        return made + y.sum((1, 3))[..., None] if self.both else made


SPECS = ["x:float32[batch,seq,24]", "mask:bool[batch,seq]"]


@pytest.mark.parametrize("both", [False, True])
def test_transposes_around_it_go(both: bool, tmp_path: Path) -> None:
    """Where nothing else reads what they give."""
    path = tmp_path / "m.onnx"
    result = rewriter.rewrite(Block(both).eval(), "fuse-attention", SPECS, "onnxruntime", out=str(path), timing=False, force=True)
    assert result.exit_code == 0, result.message
    assert [(c.kind, c.reason) for c in coverage(path)] == [("Attention", "")]
    model = load_onnx(path)
    cover(model, kernels(), 1)
    (node,) = (n for n in model.graph if n.domain == DOMAIN)
    assert node.attributes["turned"].as_int() == (7 if both else 15)
    assert ("Transpose" in {n.op_type for n in model.graph}) == both
    for batch, seq in ((2, 5), (1, 1), (3, 40)):
        x, mask = torch.randn(batch, seq, 24), torch.rand(batch, seq) > 0.3
        mask[:, 0] = True
        given = {"x": x, "mask": mask}
        (stock,), (fast,) = (run(given).values() for run in (Session(str(path), 1), open_covered(path, 2)))
        close(fast, stock)


@pytest.mark.parametrize(
    "change",
    [
        ('"heads":4', '"heads":5'),
        ('"scale":0.5', '"scale":"x"'),
        ('"key":5', '"key":0'),
        ('"empty":""', '"empty":"what"'),
        ('"hidden":-Infinity', '"hidden":"x"'),
    ],
)
def test_a_node_that_lies_is_left_to_stock_operators(change: tuple[str, str]) -> None:
    model = stacked_maps([Attention.random(torch.Generator().manual_seed(0))])
    (node,) = model.graph
    assert change[0] in node.metadata_props[SPEC]
    node.metadata_props[SPEC] = node.metadata_props[SPEC].replace(*change)
    (found,) = cover(model, kernels(), 1)
    assert found.reason and [n.op_type for n in model.graph] == ["Attention"]


def test_halves_are_left_to_stock_operators() -> None:
    model = stacked_maps([Attention.random(torch.Generator().manual_seed(0))], torch.float16)
    (found,) = cover(model, kernels(), 1)
    assert "kernels take float32" in found.reason


def test_a_scale_that_is_no_number_is_not_covered() -> None:
    with pytest.raises(NotCovered, match="none of Attention's"):
        heads_of(Attention(2, 2, 5, 5, float("inf")))


def test_a_kernel_that_is_off_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Kernels.attend
    monkeypatch.setattr(Kernels, "attend", lambda *args: 1.01 * whole(*args))
    with pytest.raises(RewriteError, match="the kernels are off by"):
        check(kernels())


RUNTIME = {
    "query": ((1, 4, 3, 7), None), "axes": ((1, 4, 24), None), "mask": ((1, 4, 3, 8), (1, 1, 2, 3)), "mask's axes": ((1, 4, 3, 8), (3,)),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNTIME)
def test_other_shapes_are_an_error_at_run_time(name: str) -> None:
    """Where the model's own shapes say nothing."""
    shape, mask = RUNTIME[name]
    xs = [ir.val(n, ir.DataType.FLOAT, None) for n in ("query", "key", "value", *(["mask"] if mask else []))]
    node = attention_node(xs, Heads(4, 4, 8, 8, 1.0), 1)
    y = node.outputs[0]
    y.name, y.type = "y", xs[0].type
    graph = ir.Graph(xs, [y], nodes=[node], opset_imports={"": 20, DOMAIN: 1}, name="attention")
    session = Session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), 1, library=str(kernels().path))
    k = np.zeros((1, 4, 3, 8), np.float32)
    given = {"query": np.zeros(shape, np.float32), "key": k, "value": k, **({"mask": np.zeros(mask, np.float32)} if mask else {})}
    with pytest.raises(Exception, match="of an Attention has"):
        session.session.run(None, given)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("machine", [NATIVE, ()], ids=["native", "portable"])
def test_it_reads_and_writes_nothing_else(sanitizer: str, machine: Sequence[str], tmp_path: Path) -> None:
    program = built(tmp_path, sanitizer, DRIVER, "attention.cpp", machine)
    cases = [case(seed) for seed in range(60)]
    with (tmp_path / "cases").open("wb") as file:
        for given in cases:
            q, k, _ = given.given
            axes = (0, 0, 0, 0) if given.mask is None else given.mask.shape
            file.write(heads_of(given.operator).packed() + struct.pack("7q", len(q), q.shape[2], k.shape[2], *axes))
            for tensor in (*given.given, *([] if given.mask is None else [given.mask])):
                file.write(tensor.numpy().tobytes())
    done = subprocess.run([str(program), str(tmp_path / "cases"), str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    data = np.fromfile(tmp_path / "out", np.float32)
    for given in cases:
        wanted = given.wanted()
        close(torch.from_numpy(data[: wanted.numel()].copy()).view(wanted.shape), wanted)
        data = data[wanted.numel() :]
    assert len(data) == 0
