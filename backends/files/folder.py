"""A Hugging Face folder is a model, its tokenizer and enough to know its inputs; it is loaded without the network and without its code.

The class is the one that config.json names (`--task` picks another head), the weights come from safetensors, and what the
folder does not hold is refused, never initialised at random.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from rewriter.backends.files.archive import one_line, read_object
from rewriter.backends.files.export import NotExported, export_module
from rewriter.backends.files.flat import PAST, flatten, model_specs, transformers_patches
from rewriter.errors import RewriteError
from rewriter.inputs import InputSpec, dim_names

TASKS = {
    "feature-extraction": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForImageSegmentation",
    "object-detection": "AutoModelForObjectDetection",
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "tokenizer.model")
HINTS = {"height": 224, "width": 224, "samples": 16000, "frames": 128}  # sizes to trace with where small ones vanish in strides
MAX_LAYERS = 10_000
MAX_LABELS = 1_000_000
_COUNTED = re.compile(r"(?:.*_)?(?:layers?|depths?|blocks|stages|experts|codebooks)")  # transformers runs a Python loop over each
_IMPLEMENTATION = re.compile(r"_?\w*_implementation(?:_internal)?")


@dataclass
class FolderModel:
    """A loaded folder. `specs` and `describe` change only when the cache has to be given up at export, which fills `notes`."""

    path: Path
    module: Any
    specs: list[InputSpec]
    tokenizer: Any | None
    describe: str
    notes: list[str] = field(default_factory=list)

    @property
    def with_past(self) -> bool:
        return any(spec.name.startswith(PAST) for spec in self.specs)

    def encode(self, lines: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Padded samples for every input, one row for each line."""
        if self.tokenizer is None:
            raise RewriteError(f"{self.path} has no tokenizer to read text with; give --data FILE.npz")
        if not lines:
            raise RewriteError("the text has no lines; give at least one")
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        limit = min(max_length or 512, tokenizer.model_max_length, _positions(self.module.config))
        tokens = dict(tokenizer(list(lines), padding=True, truncation=True, max_length=limit, return_tensors="pt"))
        rows, seq = tokens["input_ids"].shape
        tokens.setdefault("attention_mask", torch.ones(rows, seq, dtype=torch.int64))
        tokens["position_ids"] = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        tokens.setdefault("token_type_ids", torch.zeros(rows, seq, dtype=torch.int64))
        return {spec.name: self._encoded(spec, tokens, rows) for spec in self.specs}

    def _encoded(self, spec: InputSpec, tokens: Mapping[str, Tensor], rows: int) -> Tensor:
        if spec.name.startswith(PAST):
            return torch.zeros(spec.shape({"batch": rows, "past": 0}), dtype=spec.torch_dtype)
        if spec.name in tokens:
            return tokens[spec.name].to(spec.torch_dtype)
        if spec.name == "decoder_input_ids" and hasattr(self.module, "prepare_decoder_input_ids_from_labels"):
            shifted: Tensor = self.module.prepare_decoder_input_ids_from_labels(labels=tokens["input_ids"])
            return shifted
        raise RewriteError(f"text gives no {spec.name!r}, which {type(self.module).__name__} needs; give --data FILE.npz")


def _positions(config: Any) -> int:
    found = getattr(config, "max_position_embeddings", None) or 1 << 30
    # RoBERTa numbers its positions from after the padding's
    offset = (getattr(config, "pad_token_id", 0) or 0) + 1 if "roberta" in config.model_type else 0
    return int(found) - offset


def load_folder(path: str | os.PathLike[str], task: str | None = None) -> FolderModel:
    """Load a folder as transformers saves them."""
    folder = Path(path)
    check_links(folder)
    config = _read_config(folder)
    _check_shards(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        why = "" if missing else f" whole, and here it fails ({f'{type(error).__name__}: {error}'.splitlines()[0]})"
        raise RewriteError(
            f"{folder} is a Hugging Face folder, which needs transformers{why}: pip install rewriter[transformers]"
        ) from None
    chosen = _model_class(transformers, config, task)
    model, notes = _load_weights(transformers, chosen, folder)
    tokenizer = _load_tokenizer(transformers, folder)
    name = type(model).__name__
    specs = model_specs(model, with_cache=True)
    if any(spec.name.startswith(PAST) for spec in specs):
        notes.append("with past keys and values")
    else:
        specs = model_specs(model, with_cache=False)
        if model.can_generate():
            notes.append("without a cache (this class keeps none that a graph can pass in and out as plain tensors and go on from)")
    flatten(model, specs)
    dtype = str(model.dtype).removeprefix("torch.")
    return FolderModel(folder, model, specs, tokenizer, "; ".join([f"{name}, {dtype}", *notes]))


def export_folder(folder_model: FolderModel, sizes: Mapping[str, int]) -> ExportedProgram:
    """Export with dynamic batch and lengths; a cache that cannot be traced is given up, and `describe` says so."""
    hints = {name: HINTS[name] for name in dim_names(folder_model.specs) if name in HINTS} | dict(sizes)
    model = folder_model.module
    try:
        with transformers_patches(model):
            return export_module(model, folder_model.specs, hints, folder_model.notes, own=True)
    except NotExported as error:
        if not folder_model.with_past:
            raise
        reason = error.reason
    folder_model.specs = model_specs(model, with_cache=False)
    folder_model.describe = folder_model.describe.replace("with past keys and values", f"without its cache ({reason})")
    flatten(model, folder_model.specs)
    with transformers_patches(model):
        without = {name: n for name, n in hints.items() if name != "past"}
        return export_module(model, folder_model.specs, without, folder_model.notes, own=True)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise RewriteError(f"{folder} is an adapter; give its base model's folder, and this one as --adapter {folder}")
        raise RewriteError(f"{folder} has no config.json; a Hugging Face folder holds config.json and *.safetensors")
    config = read_object(file, "a model's configuration")
    if (folder / "adapter_config.json").is_file():  # which transformers would mix in, or not, as peft is installed or not
        raise RewriteError(f"{folder} holds an adapter beside its model; move it to a folder of its own and give that as --adapter")
    if config.get("auto_map"):
        raise RewriteError(
            f"{folder} brings its own Python code (auto_map in config.json), which is never run; "
            "export it yourself and give the .pt2 or .onnx"
        )
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RewriteError(f"{file}: architectures is {one_line(repr(names))}; it must list class names, correct it or fetch it again")
    for key, value in _entries(config):
        _check_entry(file, key, value)
    return config


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, those of sub-configurations too, however deep."""
    stack: list[Any] = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield from value.items()
            stack.extend(part for key, part in value.items() if key not in ("id2label", "label2id"))
        elif isinstance(value, list):
            stack.extend(value)


def _check_entry(file: Path, key: str, value: Any) -> None:
    """What would make transformers build without end, or fetch its kernels from a repository."""
    limit = MAX_LABELS if key == "num_labels" else MAX_LAYERS if _COUNTED.fullmatch(key) else None
    sizes = [size for size in (value if isinstance(value, list) else [value]) if isinstance(size, int)]
    if limit is not None and (sum(sizes) if key.endswith("depths") else max(sizes, default=0)) > limit:
        raise RewriteError(f"{file}: {key} is above {limit}, which no model has; correct it or fetch the folder again")
    if _IMPLEMENTATION.fullmatch(key) and "/" in repr(value):
        raise RewriteError(
            f"{file}: {key} is {one_line(repr(value))}, code from a repository, which is never run; remove it, or name a built-in one"
        )
    if key == "transformers_weights" and value is not None and not _is_plain_name(value):
        raise RewriteError(f"{file}: {key} is {one_line(repr(value))}; only the name of a file in the folder is allowed, copy it there")


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not re.search(r"[/\\:\x00-\x1f]", value)


def check_links(folder: Path) -> None:
    """Nothing outside the folder is read. The hub's cache links each snapshot's files to blobs beside it: its repository is one folder."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            inside = not file.is_symlink() or file.resolve().is_relative_to(home)
        except (OSError, RuntimeError):  # a link to itself
            inside = False
        if not inside:
            raise RewriteError(f"{file} links to a file outside {home}; only files in the folder are read, copy it there")


def _check_shards(folder: Path) -> None:
    """The index names the files that transformers opens, by whatever path it says."""
    for file in sorted(folder.glob("*.index.json")):
        shards = read_object(file, "an index of weights").get("weight_map")
        if not isinstance(shards, dict):
            raise RewriteError(f"{file} has no weight_map from tensors to files; fetch or write it again")
        for shard in shards.values():
            if not _is_plain_name(shard):
                raise RewriteError(f"{file} names {one_line(repr(shard))}; only names of files in the folder are allowed, copy it there")
            if not (folder / shard).is_file():
                raise RewriteError(f"{file} names {shard!r}, which {folder} does not hold; fetch the folder again")


def _model_class(transformers: Any, config: Mapping[str, Any], task: str | None) -> Any:
    if task is not None:
        found = getattr(transformers, TASKS.get(task, f"AutoModelFor{task}"), None)
        if found is None:
            raise RewriteError(f"--task {task!r} is not known; choose one of {', '.join(TASKS)}")
        return found
    names = config.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if found is transformers.AutoModel or (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return found
    raise RewriteError(
        f"config.json names the class {one_line(repr(names[0]))}, which is no model of transformers {transformers.__version__}; "
        f"correct architectures, or choose a head with --task ({', '.join(TASKS)})"
    )


def _load_weights(transformers: Any, chosen: Any, folder: Path) -> tuple[Any, list[str]]:
    safe = any(folder.glob("*.safetensors"))
    if not safe and not any(folder.glob("pytorch_model*.bin")):
        raise RewriteError(f"{folder} holds no weights; expected *.safetensors, or pytorch_model.bin")
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        # A .bin goes through torch.load(weights_only=True), which is what transformers passes by default
        model, info = chosen.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=safe, dtype="auto", output_loading_info=True
        )
    except Exception as error:
        raise _unloaded(folder, chosen, error) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    return model.eval(), _missing(model, folder, sorted(info["missing_keys"]))


def _unloaded(folder: Path, chosen: Any, error: Exception) -> RewriteError:
    if isinstance(error, pickle.UnpicklingError):  # torch's own text recommends to run it
        return RewriteError(
            f"{folder}: its .bin weights are a pickle that does more than hold tensors, which is not run; "
            "load it where you trust it and save the model as safetensors"
        )
    text = one_line(str(error).replace(":\n", ": "))
    if "ignore_mismatched_sizes" in text:
        text = "its weights have other shapes than config.json says"
    kind = "" if " " in text else f"{type(error).__name__} "  # a bare name says nothing without its kind
    return RewriteError(f"{folder} cannot be loaded as {chosen.__name__}: {kind}{text}; fetch it again, or choose another --task")


def _missing(model: Any, folder: Path, missing: Sequence[str]) -> list[str]:
    """A pooler that was never trained is dropped; any other missing weight is refused."""
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
        return ["without pooler_output (the folder holds no weights for it)"]
    if missing:
        raise RewriteError(
            f"{folder} holds no weights for {missing[0]} ({len(missing)} missing), "
            f"which {type(model).__name__} needs; choose another --task"
        )
    return []


def _load_tokenizer(transformers: Any, folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # a model without a readable tokenizer is a model still: asked for text, `encode` says so
        return None
