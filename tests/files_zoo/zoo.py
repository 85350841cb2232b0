"""Small models with random weights, one for each way in which libraries spell a linear: built offline, exported in seconds.

`linears` counts a model's dense linear modules: Linear, Conv1D, 1x1 convolutions of one group, and packed in_proj weights.
A module that runs several times (ALBERT's shared layer) counts once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter.backends.files.export import export_module
from rewriter.backends.files.flat import PAST, flatten, transformers_patches
from rewriter.inputs import InputSpec, invent, parse_input
from tests.files_zoo import nets
from tests.files_zoo.without_torchvision import timm

VOCAB = 99


@dataclass(frozen=True)
class Entry:
    """`build` gives a module in eval mode whose forward takes `specs` by name; `sizes` to trace with, `other` to run at."""

    build: Callable[[], nn.Module]
    specs: list[InputSpec]
    sizes: dict[str, int]
    other: dict[str, int]
    linears: int
    bounds: dict[str, int] = field(default_factory=dict)

    def inputs(self, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
        return invent(self.specs, sizes, self.bounds, sizes["batch"], seed)


def count_linears(module: nn.Module) -> int:
    return sum(_linears_in(part) for part in module.modules())


def _linears_in(part: nn.Module) -> int:
    if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D":
        return 1  # MultiheadAttention's out_proj is a Linear too
    if isinstance(part, nn.MultiheadAttention):
        return int(part.in_proj_weight is not None)
    if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return int(set(part.kernel_size) == {1} and part.groups == 1)
    return 0


def module(name: str) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return ZOO[name].build().eval()


@functools.cache
def program(name: str) -> ExportedProgram:
    """Shared by the tests of a process: clone it before changing it."""
    entry, built = ZOO[name], module(name)
    with transformers_patches(built):
        return export_module(built, entry.specs, entry.sizes)


def hugging(name: str, config: str, /, **settings: Any) -> nn.Module:
    """A transformers model with its own forward, as it would be saved into a folder."""
    import transformers as untyped

    transformers: Any = untyped
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.ERROR)
    try:
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
        return model.eval()
    finally:
        transformers.logging.set_verbosity(before)


def _entry(build: Callable[[], nn.Module], linears: int, specs: list[InputSpec], bounds: dict[str, int], **sizes: tuple[int, int]) -> Entry:
    both = {"batch": (3, 5), **sizes}
    first, other = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    return Entry(build, specs, first, other, linears, bounds)


def _plain(build: Callable[[], nn.Module], linears: int, *specs: str, **sizes: tuple[int, int]) -> Entry:
    return _entry(build, linears, [parse_input(spec) for spec in specs], {"ids": 50}, **sizes)


def _hugging(source: tuple[str, str, dict[str, Any]], linears: int, specs: list[InputSpec], **sizes: tuple[int, int]) -> Entry:
    name, config, settings = source

    def build() -> nn.Module:
        model = hugging(name, config, **settings)
        flatten(model, specs)
        return model

    bounds = {"input_ids": VOCAB, "decoder_input_ids": VOCAB, "token_type_ids": 2}
    return _entry(build, linears, specs, bounds, **sizes)


IDS, MASK, TYPES = (f"{name}:int64[batch,seq]" for name in ("input_ids", "attention_mask", "token_type_ids"))
TARGETS = "decoder_input_ids:int64[batch,target]"
SEQ = (6, 9)
PIXELS = "pixel_values:float32[batch,3,32,32]"


def _read(*specs: str) -> list[InputSpec]:
    return [parse_input(spec) for spec in specs]


def _cached(layers: int, heads: int, width: int) -> list[InputSpec]:
    """A decoder's inputs, in its forward's order, then its cache."""
    rest = ["attention_mask:int64[batch,past+seq]", "position_ids:int64[batch,seq]"]
    sides = [f"{PAST}{i}_{side}:float32[batch,{heads},past,{width}]" for i in range(layers) for side in ("keys", "values")]
    return _read(IDS, *rest, *sides)


_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA = _BERT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_NEOX = _BERT | {"bos_token_id": 1, "eos_token_id": 2}
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
_WHISPER = _BART | {
    "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
_DISTIL = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
_CONVNEXT = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 2], "image_size": 32}
_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "bottleneck"}

SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT | {"type_vocab_size": 1, "pad_token_id": 1}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL),
    "electra": ("ElectraModel", "ElectraConfig", _BERT | {"embedding_size": 16}),
    "albert": ("AlbertModel", "AlbertConfig", _BERT | {"embedding_size": 16}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEOX),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _CONVNEXT),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", _RESNET),
}


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """One of timm's architectures by its registered name, without its weights."""

    def build() -> nn.Module:
        model: nn.Module = timm().create_model(name, pretrained=False, num_classes=10, **settings)
        return model

    return build


_TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_TIMM_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}

_CACHE = {"past": (5, 3), "seq": (6, 2)}
_BOTH = {"seq": SEQ, "target": (4, 7)}

ZOO: dict[str, Entry] = {
    "bert": _hugging(SOURCES["bert"], 13, _read(IDS, MASK, TYPES), seq=SEQ),
    "roberta": _hugging(SOURCES["roberta"], 14, _read(IDS, MASK), seq=SEQ),
    "distilbert": _hugging(SOURCES["distilbert"], 14, _read(IDS, MASK), seq=SEQ),
    "electra": _hugging(SOURCES["electra"], 13, _read(IDS, MASK, TYPES), seq=SEQ),
    "albert": _hugging(SOURCES["albert"], 8, _read(IDS, MASK, TYPES), seq=SEQ),
    "gpt2": _hugging(SOURCES["gpt2"], 9, _cached(2, 4, 8), **_CACHE),
    "llama": _hugging(SOURCES["llama"], 15, _cached(2, 2, 8), **_CACHE),
    "qwen2": _hugging(SOURCES["qwen2"], 15, _cached(2, 2, 8), **_CACHE),
    "qwen3": _hugging(SOURCES["qwen3"], 15, _cached(2, 2, 8), **_CACHE),
    "mistral": _hugging(SOURCES["mistral"], 15, _cached(2, 2, 8), **_CACHE),
    "gpt_neox": _hugging(SOURCES["gpt_neox"], 9, _cached(2, 4, 8), **_CACHE),
    "opt": _hugging(SOURCES["opt"], 13, _cached(2, 4, 8), **_CACHE),
    "t5": _hugging(SOURCES["t5"], 33, _read(IDS, MASK, TARGETS), **_BOTH),
    "bart": _hugging(SOURCES["bart"], 33, _read(IDS, MASK, TARGETS), **_BOTH),
    "whisper": _hugging(SOURCES["whisper"], 33, _read("input_features:float32[batch,8,32]", TARGETS), target=(4, 7)),
    "vit": _hugging(SOURCES["vit"], 13, _read(PIXELS)),
    "convnext": _hugging(SOURCES["convnext"], 7, _read(PIXELS)),
    "resnet": _hugging(SOURCES["resnet"], 7, _read("pixel_values:float32[batch,3,height,width]"), height=(32, 48), width=(40, 64)),
    "timm_vit": _plain(_timm("vit_tiny_patch16_224", **_TIMM_VIT), 9, "x:float32[batch,3,32,32]"),
    "timm_swin": _plain(_timm("swin_tiny_patch4_window7_224", **_TIMM_SWIN), 14, "x:float32[batch,3,32,32]"),
    "timm_mobilenet": _plain(_timm("mobilenetv3_small_050"), 42, "x:float32[batch,3,height,width]", height=(64, 96), width=(64, 128)),
    "encoder": _plain(_encoder, 8, "src:float32[batch,seq,16]", seq=SEQ),
    "tagger": _plain(nets.Tagger, 1, "ids:int64[batch,seq]", seq=SEQ),
    "gru": _plain(nets.GruRegressor, 1, "x:float32[batch,seq,12]", seq=SEQ),
    "cnn": _plain(nets.PointwiseCnn, 3, "image:float32[batch,3,height,width]", height=(12, 16), width=(10, 20)),
    "mixer": _plain(nets.Mixer, 9, "patches:float32[batch,12,16]"),
    "tied": _plain(nets.TiedAutoencoder, 1, "x:float32[batch,24]"),
    "no_grad": _plain(nets.NoGradBranch, 2, "x:float32[batch,16]"),
}
