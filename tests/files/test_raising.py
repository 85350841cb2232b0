"""Known recurrences of transformers become nodes of any length; exported as they are, they are wrong at others, and nobody says so."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rewriter import registry
from rewriter.backend import EmitOptions
from rewriter.backends.files.export import export_module
from rewriter.backends.files.flat import PAST, PRESENT, cache_specs, flatten, model_specs, plain_class, transformers_patches
from rewriter.backends.files.lengths import narrow
from rewriter.backends.files.load import open_source
from rewriter.backends.files.quiet import muted
from rewriter.backends.fx.custom_op import MAP
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.onnx.run import Session
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.options import Options
from rewriter.tolerances import EQUAL
from tests.files_zoo import rules
from tests.files_zoo.recurrent import RECURRENT, Raised, build, raised
from tests.files_zoo.zoo import VOCAB, hugging

LENGTHS = (1, 7, 64, 130)  # tokens
QUICK = ("qwen3_next", "mamba2", "mamba", "recurrent_gemma")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECURRENT]
RTOL, ATOL = EQUAL[torch.float32]
SPEC = parse_input("x:float32[batch,time,16]")
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def _equal_at_all_lengths(run: Run, model: Raised) -> None:
    for tokens in LENGTHS:
        inputs = model.inputs(tokens)
        with torch.no_grad():
            expected = model.module(**inputs)
        found = run(inputs)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=RTOL, atol=ATOL)


def _emitted(program: ExportedProgram, target: str, folder: Path) -> Run:
    made = registry.targets()[target]()
    path = folder / f"model{made.suffix}"
    made.emit(FxGraph.of(program), path, EmitOptions(tokens=(64,), threads=1))
    run: Run = made.open(path, 1)
    return run


@pytest.mark.parametrize("name", ALL)
def test_calls_become_nodes(name: str) -> None:
    entry, model = RECURRENT[name], raised(name)
    graph = FxGraph.of(model.program)
    found = [graph.operator(node) for node in graph.nodes() if graph.op(node) == "structured"]
    assert [type(operator).__name__ for operator in found] == [entry.operator] * entry.calls
    (note,) = model.notes
    said = rf"{entry.calls} calls? of {entry.function} raised to one node( each)?, equal to the function at 1, \d+, \d+, \d+ tokens; "
    assert re.match(said, note)
    assert any(spec.name.startswith(PAST) for spec in model.specs) == entry.cached
    sites = [site for site in registry.sites(graph) if site.kind == "recurrence"]
    assert len(sites) == entry.calls
    assert all("raised to one node before the model was exported" in site.reason for site in sites)
    assert narrow(model.program, model.specs, "") == []
    _equal_at_all_lengths(graph.run, model)


ONNX = [p for p in RECURRENT if p != "kimi_linear"]  # whose experts torch.onnx cannot export


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("qwen3_next", "mamba2") else pytest.mark.slow) for n in ONNX])
def test_under_onnx_runtime(name: str, tmp_path: Path) -> None:
    _equal_at_all_lengths(_emitted(raised(name).program, "onnxruntime", tmp_path), raised(name))


@pytest.mark.parametrize("name", ["mamba", *(pytest.param(name, marks=pytest.mark.slow) for name in RECURRENT if name != "mamba")])
def test_as_pt2(name: str, tmp_path: Path) -> None:
    _equal_at_all_lengths(_emitted(raised(name).program, "torch", tmp_path), raised(name))


@pytest.mark.parametrize("name", [p for p in ALL if RECURRENT[str(p.values[0])].cached])
@pytest.mark.parametrize("pieces", [(70,), (69, 1), (1, 1, 66, 2)])
def test_a_sequence_in_pieces_is_the_sequence(name: str, pieces: tuple[int, ...]) -> None:
    """Keys, values and states go out and in again; zeros are the past of no token."""
    model, ids = raised(name), torch.arange(2 * 70).reshape(2, 70) % (VOCAB - 1) + 1
    run, begin, logits = model.program.module(), 0, []
    past = {s.name: torch.zeros(s.shape({"batch": 2, "past": 0}), dtype=s.torch_dtype) for s in model.specs if s.name.startswith(PAST)}
    grows = any("past" in spec.dims for spec in model.specs)
    for piece in pieces:
        end = begin + piece
        given = {"input_ids": ids[:, begin:end], "position_ids": torch.arange(begin, end)[None].expand(2, -1)}
        given["attention_mask"] = torch.ones(2, end if grows else piece, dtype=torch.int64)
        found = run(**{spec.name: given[spec.name] for spec in model.specs if spec.name in given}, **past)
        past = {name.replace(PRESENT, PAST): value for name, value in found.items() if name.startswith(PRESENT)}
        logits.append(found["logits"])
        begin = end
    with torch.no_grad():
        whole = plain_class(model.module).forward(model.module, input_ids=ids).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=RTOL, atol=ATOL)


def test_a_state_that_is_not_read_is_no_input() -> None:
    """transformers' scan of Mamba starts from zero whatever the cache holds, unless there is one token."""
    assert cache_specs(build("mamba")) == []


@pytest.mark.slow
def test_exported_as_it_is_it_is_silently_wrong(tmp_path: Path) -> None:
    layer = rules.Imported().eval()
    alone = torch.export.export(layer, (), {"x": torch.randn(2, 6, 16)}, dynamic_shapes={"x": {1: Dim.AUTO}})  # two chunks of 3
    with muted():
        torch.onnx.export(alone, f=tmp_path / "alone.onnx", dynamo=True, verbose=False, output_names=["output"])
    runs = {
        "alone": Session(str(tmp_path / "alone.onnx"), threads=1),
        "raised": _emitted(export_module(layer, [SPEC], {}), "onnxruntime", tmp_path),
    }
    errors = {which: [_error(run, layer, tokens) for tokens in (5, 6, 7, 64, 130)] for which, run in runs.items()}
    assert max(errors["raised"]) < RTOL
    assert max(errors["alone"][:2]) < RTOL
    assert min(errors["alone"][2:]) > 100 * RTOL  # no exception, no word
    (said,) = narrow(alone, [SPEC], "give the module")
    assert "at time = 63, 64, 65, 200 its guard" in said
    assert said.endswith("// 3) == 2 fails, which exporters drop, and the result may be wrong; give the module")


def _error(run: Run, layer: nn.Module, tokens: int) -> float:
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        expected = layer(x)
    found = run({"x": x})["output"]
    return float((found[:, :tokens] - expected[:, : found.shape[1]]).norm() / expected.norm())


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (rules.Imported(), torch.float32),
        (rules.Imported(), torch.bfloat16),
        (rules.Mixer(rules.fused_recurrent_gated_delta_rule, scale=0.5), torch.float32),
        (rules.Product(scale=0.5), torch.float32),
    ],
    ids=["imported", "bfloat16", "attribute", "product"],
)
def test_wherever_the_function_is_bound(layer: rules.Mixer, dtype: torch.dtype) -> None:
    layer, notes = layer.to(dtype).eval(), list[str]()
    spec = parse_input(f"x:{str(dtype).removeprefix('torch.')}[batch,time,16]")
    program = export_module(layer, [spec], {}, notes)
    assert "raised to one node" in notes[0]
    rtol, atol = EQUAL[dtype]
    for tokens in LENGTHS:
        x = torch.randn(3, tokens, 16).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x=x), layer(x), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (rules.Impostor(), r"chunk_delta_rule is not raised: its result differs from the recurrence by \S+ at 1 tokens"),
        (rules.Packed(), r"fused_recurrent_gated_delta_rule is not raised: its argument 'cu_seqlens' is not read"),
    ],
)
def test_what_is_not_what_it_says_is_left_alone(layer: nn.Module, said: str) -> None:
    notes: list[str] = []
    static = parse_input("x:float32[2,5,16]")
    program = export_module(layer.eval(), [static], {}, notes)
    assert not program.graph.find_nodes(op="call_function", target=MAP)
    (note,) = notes
    assert re.match(said, note)


def test_everything_is_put_back() -> None:
    model = build("qwen3_next")
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    raised("qwen3_next")
    assert dict(vars(module)) == before
    own = rules.fused_recurrent_gated_delta_rule
    with pytest.raises(RewriteError, match="cannot trace"):
        export_module(rules.Mixer(own, nonsense=1), [SPEC], {})
    assert rules.fused_recurrent_gated_delta_rule is own


@pytest.mark.slow
def test_a_maximum_in_the_state_is_listed() -> None:
    model = hugging("RwkvForCausalLM", "RwkvConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=16)
    specs = model_specs(model, with_cache=False)
    flatten(model, specs)
    said = r"fixes dimension 'seq'.*rwkv_linear_attention is not raised: its state keeps a running maximum"
    with pytest.raises(RewriteError, match=said), transformers_patches(model):
        export_module(model, specs, {})


@pytest.mark.slow
def test_the_way_on_from_such_a_folder_is_one(tmp_path: Path) -> None:
    """Traced at one size by its user, the model is read."""
    model = hugging("RwkvForCausalLM", "RwkvConfig", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=16)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(RewriteError, match="trace it yourself at the size that you need"):
        open_source(tmp_path, Options())
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.zeros(2, 4, dtype=torch.int64),)), path)
    source = open_source(path, Options())
    assert source.graph.specs()[0].dims == (2, 4)
    assert sum(site.kind == "linear" for site in registry.sites(source.graph)) > 8
