"""Sessions with kernels: the same outputs as stock ONNX Runtime, what is covered and fused, and stock where kernels cannot be had."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.backends.kernels import library, naive, session
from rewriter.backends.kernels.plan import Plan, Product
from rewriter.errors import RewriteError
from rewriter.tolerances import EQUAL

RTOL, ATOL = EQUAL[torch.float32]


class Block(nn.Module):
    """Each activation as modules and as formulas, residuals, a norm behind one, a weightless end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(i, o) for i, o in ((32, 96), (96, 32), (32, 64), (64, 32), (32, 40)))
        self.f, self.norm = nn.Linear(32, 32), nn.LayerNorm(32, 1e-3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(nn.functional.gelu(self.a(x))) + x
        c = self.c(h)
        h = self.d(c * torch.sigmoid(c)) + h
        h = self.norm(self.f(h) + h)
        e = self.e(h)
        return 0.5 * e * (1 + torch.tanh(0.7978845608028654 * (e + 0.044715 * e * e * e)))


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kernels") / "net.onnx"
    options = {"inputs": ["x:float32[batch,time,32]"], "target": "onnxruntime", "timing": False, "objective": "params", "force": True}
    rewriter.rewrite(Block(), "monarch:blocks=4:rank=2", out=str(path), **options)  # type: ignore[arg-type]
    return path


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    session.trusted.cache_clear()


def ran(model: object, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    (y,) = model.run(None, {model.get_inputs()[0].name: x})  # type: ignore[attr-defined]
    return np.asarray(y)


def agree(path: Path, model: object) -> None:
    stock = ort.InferenceSession(str(path))  # type: ignore[attr-defined]
    for shape in ((1, 1, 32), (3, 7, 32), (2, 0, 32), (5, 40, 32)):
        x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        np.testing.assert_allclose(ran(model, x), ran(stock, x), RTOL, ATOL)


def test_a_session_gives_what_stock_gives(rewritten: Path) -> None:
    before = rewritten.read_bytes()
    model = rewriter.inference_session(rewritten)
    assert type(model) is ort.InferenceSession  # type: ignore[attr-defined]
    agree(rewritten, model)
    assert rewritten.read_bytes() == before


def test_names_stay(rewritten: Path) -> None:
    stock, model = ort.InferenceSession(str(rewritten)), rewriter.inference_session(rewritten)  # type: ignore[attr-defined]
    for which in ("get_inputs", "get_outputs"):
        assert [(v.name, v.shape, v.type) for v in getattr(model, which)()] == [(v.name, v.shape, v.type) for v in getattr(stock, which)()]


def test_what_is_covered_and_what_goes_with_it(rewritten: Path) -> None:
    covered = {c.site: c for c in session.coverage(rewritten)}
    assert {c.reason for c in covered.values()} == {""}
    fused = {site: c.fused for site, c in covered.items()}
    assert fused == {
        **{"a": ("bias", "gelu"), "b": ("bias", "sum"), "c": ("bias", "silu"), "d": ("bias", "sum")},
        **{"f": ("bias", "sum", "norm"), "e": ("bias", "gelu-tanh")},
    }


def test_options_are_kept(rewritten: Path) -> None:
    options = ort.SessionOptions()  # type: ignore[attr-defined]
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = rewriter.inference_session(rewritten, options)
    agree(rewritten, model)
    kept = model.get_session_options()
    assert (kept.intra_op_num_threads, kept.log_severity_level) == (1, 3)


@pytest.mark.parametrize("switch", [{"REWRITER_KERNELS": "off"}, {"CXX": "", "PATH": os.devnull}], ids=["off", "no compiler"])
def test_without_kernels_stock_runs_and_a_warning_says_why(
    rewritten: Path, switch: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session.trusted.cache_clear()
    library.opened.cache_clear()
    for name, value in switch.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(RuntimeWarning, match=r"net\.onnx runs on stock operators: (no C|kernels are switched off)"):
        model = rewriter.inference_session(rewritten)
    agree(rewritten, model)


def test_kernels_that_are_wrong_here_are_not_used(rewritten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.trusted.cache_clear()
    monkeypatch.setattr(session.naive, "run", lambda steps, x: torch.zeros(len(x), steps.outputs))
    with pytest.warns(RuntimeWarning, match=r"off by .* from their plain form on this machine; they are not used"):
        agree(rewritten, rewriter.inference_session(rewritten))


def _shared(step: Product) -> bool:
    return step.pattern is not None and bool((step.pattern.rows[:, :1] == step.pattern.rows[:, 1:2]).all())


KINDS: dict[str, Callable[[Product], bool]] = {
    "floats": lambda step: step.scale is None and step.pattern is None,
    "8 bits": lambda step: step.scale is not None and step.bits == 8,
    "4 bits": lambda step: step.bits == 4,
    "a pattern for each column": lambda step: step.pattern is not None and not _shared(step),
    "a shared pattern": _shared,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_is_tried(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = naive.run

    def wrong(steps: Plan, x: torch.Tensor) -> torch.Tensor:
        return plain(steps, x) + any(KINDS[kind](step) for step in steps.steps if isinstance(step, Product))

    monkeypatch.setattr(session.naive, "run", wrong)
    with pytest.raises(RewriteError, match="they are not used"):
        session.check(library.kernels())


def test_an_old_runtime_is_said(rewritten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.trusted.cache_clear()
    monkeypatch.setattr(session, "version", lambda name: "1.16.3")
    with pytest.raises(RewriteError, match=r"ONNX Runtime 1.16.3 is too old for kernels; they need 1.17"):
        session.trusted()


def test_a_model_without_structure_is_stock(tmp_path: Path) -> None:
    path = tmp_path / "dense.onnx"
    torch.onnx.export(nn.Linear(4, 3).eval(), (torch.randn(2, 4),), str(path), dynamo=True, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(ran(rewriter.inference_session(path), x), ran(ort.InferenceSession(str(path)), x))  # type: ignore[attr-defined]


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(RewriteError, match=r"no\.onnx"):
        rewriter.inference_session(path)


def test_a_spec_that_lies_about_its_weights_is_not_covered(rewritten: Path) -> None:
    import onnx_ir as ir

    from rewriter.backends.kernels.covering import cover
    from rewriter.backends.onnx.opaque import SPEC, is_opaque

    model = ir.load(rewritten)
    node = next(n for n in model.graph.all_nodes() if is_opaque(n))
    node.metadata_props[SPEC] = node.metadata_props[SPEC].replace('"shape":[4', '"shape":[2', 1)
    first, *others = cover(model, library.kernels(), 1)
    assert "its spec says" in first.reason and not any(c.reason for c in others)


def test_a_run_may_time_and_choose_by_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certified and timed was opened with kernels."""
    from rewriter.backends.onnx import target
    from rewriter.backends.onnx.target import OnnxRuntimeTarget

    torch.manual_seed(0)
    options = {"inputs": ["x:float32[batch,time,32]"], "target": "onnxruntime", "kernels": True, "tokens": "8"}
    path, opened = tmp_path / "m.onnx", list[Path]()
    monkeypatch.setattr(target, "open_covered", lambda path, *rest: opened.append(path) or session.open_covered(path, *rest))
    result = rewriter.rewrite(Block(), "monarch:blocks=4:rank=2", out=str(path), objective="params", force=True, **options)  # type: ignore[arg-type]
    assert len(opened) == 3  # to certify, and both to time
    assert result.exit_code == 0 and result.report.latency[0].ratio is not None
    runner = OnnxRuntimeTarget(kernels=True).open(path, 1)
    x = torch.randn(2, 8, 32)
    np.testing.assert_allclose(runner({"x": x})[result.graph.output_names()[0]].numpy(), result_of(path, x), RTOL, ATOL)  # type: ignore[union-attr]


def result_of(path: Path, x: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    return ran(ort.InferenceSession(str(path)), x.numpy())  # type: ignore[attr-defined]


def test_kernels_are_timed_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.algebra import Dense
    from rewriter.backends.onnx import measure
    from rewriter.passes.structures.low_rank import LowRank

    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    seen: list[str] = []
    timed = measure.body_call
    monkeypatch.setattr(measure, "body_call", lambda spec, lowering, *rest: seen.append(lowering) or timed(spec, lowering, *rest))
    forms = [Dense(torch.randn(32, 32)), LowRank(torch.randn(32, 4), torch.randn(4, 32))]
    assert len(measure.measure(forms, 4, 1, kernels=True)) == 2
    assert seen == ["split", measure.KERNEL]


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_other_targets_have_no_kernels(target: str) -> None:
    with pytest.raises(RewriteError, match=f"--kernels is for --target onnxruntime, not {target}"):
        rewriter.plan(Block(), "low-rank", ["x:float32[batch,time,32]"], target=target, kernels=True)


def test_without_kernels_an_explicit_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    session.trusted.cache_clear()
    library.opened.cache_clear()
    monkeypatch.setenv("REWRITER_KERNELS", "off")
    with pytest.raises(RewriteError, match="switched off"):
        rewriter.plan(Block(), "low-rank", ["x:float32[batch,time,32]"], target="onnxruntime", kernels=True)
    library.opened.cache_clear()


@pytest.mark.parametrize("spec", ["", "[]", "{}", '{"operator":"Monarch","fields":{}}', '{"operator":"None","fields":{}}', '{"tensor":0}'])
def test_specs_that_cannot_be_read_leave_the_node_to_stock(rewritten: Path, spec: str, tmp_path: Path) -> None:
    import onnx_ir as ir

    from rewriter.backends.onnx.opaque import SPEC, is_opaque

    model = ir.load(rewritten)
    next(n for n in model.graph.all_nodes() if is_opaque(n)).metadata_props[SPEC] = spec
    path = tmp_path / "odd.onnx"
    ir.save(model, path)
    first, *others = session.coverage(path)
    assert first.reason.startswith("what it says of itself cannot be read: ") and not any(c.reason for c in others)
    agree(path, rewriter.inference_session(path))


def test_nodes_of_our_domain_in_a_file_are_refused(rewritten: Path, tmp_path: Path) -> None:
    """Packed weights are trusted by the kernel beyond what it checks cheaply; so no file may bring any."""
    import onnx_ir as ir

    model = ir.load(rewritten)
    x = model.graph.inputs[0]
    model.graph.append(ir.Node("structured.kernels", "Chain", [x, x]))
    model.graph.opset_imports["structured.kernels"] = 1
    path = tmp_path / "own.onnx"
    ir.save(model, path)
    with pytest.raises(RewriteError, match=r"holds structured\.kernels nodes of its own"):
        rewriter.inference_session(path)


def test_options_serve_several_sessions(rewritten: Path) -> None:
    options = ort.SessionOptions()  # type: ignore[attr-defined]
    for _ in range(2):
        agree(rewritten, rewriter.inference_session(rewritten, options))


def test_a_folder_that_takes_nothing_is_a_warning(rewritten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.trusted.cache_clear()
    library.opened.cache_clear()
    monkeypatch.setenv("REWRITER_CACHE", "/proc/nowhere")
    with pytest.warns(RuntimeWarning, match="the kernels cannot be kept or opened"):
        agree(rewritten, rewriter.inference_session(rewritten))
    library.opened.cache_clear()


@pytest.mark.parametrize("change", ["inputs 32 30", "inputs 32 300000000", "outputs 96 90"])
def test_specs_of_other_widths_leave_the_node_to_stock(rewritten: Path, change: str, tmp_path: Path) -> None:
    import onnx_ir as ir

    from rewriter.backends.onnx.opaque import SPEC, is_opaque

    model = ir.load(rewritten)
    node = next(n for n in model.graph.all_nodes() if is_opaque(n))
    name, old, new = change.split()
    assert f'"{name}":{old}' in node.metadata_props[SPEC]
    node.metadata_props[SPEC] = node.metadata_props[SPEC].replace(f'"{name}":{old}', f'"{name}":{new}')
    ir.save(model, tmp_path / "odd.onnx")
    first, *_ = session.coverage(tmp_path / "odd.onnx")
    assert first.reason
    agree(tmp_path / "odd.onnx", rewriter.inference_session(tmp_path / "odd.onnx"))


def test_fits_that_were_timed_without_kernels_are_not_reused(tmp_path: Path) -> None:
    """What a cached decision by time depends on: how the target runs."""
    from rewriter.backends.onnx.target import OnnxRuntimeTarget
    from rewriter.fit import Plan, fit_key
    from tests.engine.nets import Mlp, context, graph, sites

    g = graph(Mlp())
    targets = (OnnxRuntimeTarget(), OnnxRuntimeTarget(kernels=True))
    for objective, different in (("ms", True), ("params", False)):
        contexts = [context(g, tmp_path, target=target, objective=objective) for target in targets]
        stock, fast = (fit_key("model", c, Plan([], True, 0.5), sites(g)[0]) for c in contexts)
        assert (stock != fast) == different
