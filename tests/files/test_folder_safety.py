"""A Hugging Face folder from anywhere: nothing outside it is read, nothing in it runs, and nothing in its configuration hangs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as untyped

from rewriter.backends.files.folder import MAX_LABELS, MAX_LAYERS, load_folder
from rewriter.backends.files.load import open_adapters
from rewriter.errors import RewriteError
from tests.files.payloads import Payload
from tests.files_zoo.zoo import SOURCES, hugging

transformers: Any = untyped
EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nclass Tok: pass\nclass Net: pass\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    name, config, settings = SOURCES["bert"]
    hugging(name, config, **settings | {"num_hidden_layers": 1}).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        load_folder(folder, **options)
    assert "\n" not in str(caught.value)


def shard(folder: Path, target: Any, index: str = "model.safetensors.index.json") -> None:
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": target}}))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_are_named_in_the_folder(index: str, folder: Path, tmp_path: Path) -> None:
    outside = shutil.copytree(folder, tmp_path / "base") / "model.safetensors"
    name = "model.safetensors" if "safetensors" in index else "pytorch_model-1.bin"
    (folder / "model.safetensors").rename(folder / "pytorch_model-1.bin")
    shutil.copy(outside, folder / "extra.safetensors")
    for target in ("../base/model.safetensors", str(outside), "..", "", "a\\b", "C:w", 5, None, ["x"], "a\nb"):
        shard(folder, target, index)
        refused(folder, "only names of files in the folder")
    shard(folder, "gone-" + name, index)
    refused(folder, "does not hold")
    for content, match in (("{}", "no weight_map"), ('{"weight_map": 5}', "no weight_map"), ("[]", "holds no object"), ("{", "is no JSON")):
        (folder / index).write_text(content)
        refused(folder, match)


def test_whole_shards_still_load(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")})
    )
    assert load_folder(folder).describe.startswith("BertModel")


def test_the_file_that_config_names_is_in_the_folder(folder: Path) -> None:
    for target in ("../model.safetensors", "sub/model.safetensors", 5):
        configure(folder, transformers_weights=target)
        refused(folder, "transformers_weights")
    configure(folder, transformers_weights=None)
    assert load_folder(folder).describe.startswith("BertModel")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(Path("..") / name)
    refused(folder, "links to a file outside")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(folder, "links to a file outside|no config")


def test_links_within_the_folder_and_to_it_load(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert load_folder(tmp_path / "link").describe.startswith("BertModel")


def snapshot(folder: Path, home: Path) -> Path:
    """The hub cache's layout: a snapshot of links to blobs."""
    target = home / "snapshots" / "abc"
    target.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(home / "blobs" / f"sha{i}")
        (target / file.name).symlink_to(Path("../../blobs") / f"sha{i}")
    return target


def test_the_hub_caches_snapshots_load(folder: Path, tmp_path: Path) -> None:
    target = snapshot(folder, tmp_path / "models--org--name")
    assert load_folder(target).describe.startswith("BertModel")
    (target / "vocab.txt").symlink_to(tmp_path / "model")
    refused(target, "links to a file outside")


def test_no_other_layout_is_a_cache(folder: Path, tmp_path: Path) -> None:
    refused(snapshot(folder, tmp_path / "other"), "links to a file outside")


def test_an_adapters_links_are_checked_too(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(RewriteError, match="links to a file outside"):
        open_adapters([str(adapter)])


def test_an_adapter_inside_the_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(folder, "a folder of its own")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1 << 40},
        {"n_layer": MAX_LAYERS + 1},
        {"depth": 1 << 40},
        {"depths": [2, 1 << 40]},
        {"depths": [MAX_LAYERS] * 2},
        {"num_blocks": 1 << 40},
        {"num_experts": 1 << 40},
        {"num_labels": MAX_LABELS + 1},
        {"text_config": {"num_hidden_layers": 1 << 40}},
        {"parts": [{"deeper": {"encoder_layers": 1 << 40}}]},
    ],
)
def test_counts_without_end_are_refused(changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", None)  # else a missing guard would hang here
    configure(folder, **changes)
    refused(folder, r"is above \d+, which no model has")


def test_large_numbers_that_count_no_layers_load(folder: Path) -> None:
    labels = {"layers": MAX_LAYERS + 1}
    configure(
        folder, vocab_size_per_layer_input=262_144, hidden_size_per_layer_input=MAX_LAYERS + 1, num_layers=MAX_LAYERS, label2id=labels
    )
    assert load_folder(folder).describe.startswith("BertModel")


def test_deep_configurations_are_one_line(folder: Path) -> None:
    for depth in (600, 2000, 200_000):
        (folder / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
        refused(folder, "nested too deeply|cannot be loaded")
    (folder / "config.json").write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
    refused(folder, "nested too deeply")


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"'])
def test_a_configuration_is_an_object(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, "holds no object")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "is no JSON")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["__version__"], "'__version__', which is no model"),
        (["BertConfig"], "no model of transformers"),
        (["AutoTokenizer"], "no model of transformers"),
        (["NoSuchModel"], "no model of transformers"),
        (["a\nb" * 200], "no model of transformers"),
        ([5], "must list class names"),
        ({"a": 1}, "must list class names"),
        ("BertModel", "must list class names"),
    ],
)
def test_architectures_are_models(names: Any, match: str, folder: Path) -> None:
    configure(folder, architectures=names)
    refused(folder, match)


def test_a_task_stands_in_for_an_unknown_class(folder: Path) -> None:
    configure(folder, architectures=["NoSuchModel"])
    assert load_folder(folder, task="feature-extraction").describe.startswith("BertModel")
    configure(folder, architectures=None)
    assert load_folder(folder).describe.startswith("BertModel")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/repo", "evil/repo@main:kernel", {"": "evil/repo"}, "paged|evil/repo"])
def test_kernels_of_repositories_are_refused(key: str, value: Any, folder: Path) -> None:
    configure(folder, **{key: value})
    refused(folder, "code from a repository")
    configure(folder, **{key: None, "text_config": {key: value}})
    refused(folder, "code from a repository")


def test_built_in_attention_loads(folder: Path) -> None:
    configure(folder, attn_implementation="eager")
    assert load_folder(folder).describe.startswith("BertModel")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_with_our_advice(zipped: bool, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "x": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(RewriteError, match="save the model as safetensors") as caught:
        load_folder(folder)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_what_transformers_raises_is_one_line(folder: Path) -> None:
    configure(folder, hidden_size="x")
    refused(folder, "Validation error for field 'hidden_size': .+; fetch it again")
    configure(folder, hidden_size=32, max_position_embeddings=1 << 40)
    refused(folder, "other shapes than config.json says")
    configure(folder, max_position_embeddings=64, hidden_act="nothing")
    refused(folder, "KeyError 'nothing'")


class Spy:
    """Stands before a from_pretrained and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any) -> None:
        self.options: dict[str, Any] = {}
        real = owner.from_pretrained

        def call(*args: Any, **options: Any) -> Any:
            self.options = options
            return real(*args, **options)

        monkeypatch.setattr(owner, "from_pretrained", call)


def test_no_network_no_code_no_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    torch.save({"w": Payload(folder / "ran")}, folder / "pytorch_model.bin")
    model, tokenizer = Spy(monkeypatch, transformers.BertModel), Spy(monkeypatch, transformers.AutoTokenizer)
    load_folder(folder)
    for spy in (model, tokenizer):
        assert spy.options["local_files_only"] is True
        assert spy.options["trust_remote_code"] is False
    assert model.options["use_safetensors"] is True
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not (folder / "ran").exists()


def test_a_bin_alone_is_asked_for_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    spy = Spy(monkeypatch, transformers.BertModel)
    load_folder(folder)
    assert spy.options["use_safetensors"] is False
    assert spy.options.get("weights_only", True) is True


def test_a_tokenizers_own_code_never_runs(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    settings = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_folder(folder)
    assert not marker.exists()
    if loaded.tokenizer is None:
        with pytest.raises(RewriteError, match="has no tokenizer"):
            loaded.encode(["a"])


def test_a_models_own_code_never_runs(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    for auto in ({"AutoModel": "evil.Net"}, {"AutoConfig": "evil.Net"}):
        configure(folder, auto_map=auto)
        refused(folder, "own Python code")
        refused(folder, "own Python code", task="feature-extraction")
    assert not marker.exists()


def test_a_library_that_is_missing_and_one_that_is_broken_are_two_things(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(folder, r"which needs transformers: pip install rewriter\[transformers\]")
    (tmp_path / "transformers.py").write_text("raise ImportError('half of it is gone\\nlook up')")
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.syspath_prepend(tmp_path)
    refused(folder, r"needs transformers whole, and here it fails \(ImportError: half of it is gone\): pip")
