"""A transformers model seen as plain tensors in and plain tensors out.

Its inputs are read off its configuration and its forward's parameters; its cache, where it keeps one of the plain kind (keys and
values that grow, states of convolutions and recurrences that do not), becomes inputs `past_key_values_layers_0_keys` and outputs
`present_key_values_layers_0_keys`, which are the paths that transformers' own exporter names. States of zero are the past of no
token. The model's class is swapped for a subclass with that forward, so every parameter keeps its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.inputs import InputSpec

PAST = "past_key_values_layers_"
PRESENT = "present_key_values_layers_"
GROWING = ("_keys", "_values")  # slots with an axis of tokens
TOKENS = (1, 2)  # of trial runs; a padding token, whose row is zero, would hide what the model reads
CACHES = ("cache", "past_key_values")  # the argument's and the output's name, from transformers 5.24 on and before


def model_specs(model: Any, with_cache: bool) -> list[InputSpec]:
    """What the model takes, in the order in which its forward names them."""
    accepted = inspect.signature(plain_class(model).forward).parameters
    past = cache_specs(model) if with_cache else []
    known = {spec.name: spec for spec in _candidates(model, any("past" in spec.dims for spec in past))}
    main = model.main_input_name
    if main not in known:
        name = plain_class(model).__name__
        raise RewriteError(f"{name} takes {main!r}, whose shape is not known; export it yourself and give the .pt2 or .onnx")
    wanted = {main, "attention_mask", "decoder_input_ids"} if main == "input_ids" else {main, "decoder_input_ids"}
    if not model.config.is_encoder_decoder:
        wanted.discard("decoder_input_ids")
    if main == "input_ids" and hasattr(model.config, "vision_config"):
        wanted.add("pixel_values")
    types = getattr(model.config, "type_vocab_size", 0) or 0
    if types > 1:
        wanted.add("token_type_ids")
    if past:
        wanted.add("position_ids")
    return [known[name] for name in accepted if name in wanted and name in known] + past


def _candidates(model: Any, with_past: bool) -> list[InputSpec]:
    dtype = str(model.dtype).removeprefix("torch.")
    whole = "past+seq" if with_past else "seq"
    config = model.config
    vision = getattr(config, "vision_config", config)
    image = getattr(vision, "image_size", None)
    sides = (image, image) if isinstance(image, int) else tuple(image) if image else ("height", "width")
    batch = "batch" if model.main_input_name == "pixel_values" else "images"
    mels, frames = getattr(config, "num_mel_bins", 80), getattr(config, "max_source_positions", None)
    return [
        InputSpec("input_ids", "int64", ("batch", "seq")),
        InputSpec("attention_mask", "int64", ("batch", whole)),
        InputSpec("token_type_ids", "int64", ("batch", "seq")),
        InputSpec("position_ids", "int64", ("batch", "seq")),
        InputSpec("decoder_input_ids", "int64", ("batch", "target")),
        InputSpec("pixel_values", dtype, (batch, getattr(vision, "num_channels", 3), *sides)),
        InputSpec("input_features", dtype, ("batch", mels, 2 * frames if frames else "frames")),
        InputSpec("input_values", dtype, ("batch", "samples")),
    ]


def cache_specs(model: Any) -> list[InputSpec]:
    """The cache's tensors, read off a two-token run; empty where the model keeps none, or one that it does not go on from."""
    from transformers.cache_utils import DynamicCache

    plain = plain_class(model)
    generative = model.can_generate() or plain.__name__.endswith("Model")
    argument = _cache_argument(plain)
    if model.config.is_encoder_decoder or not generative or argument is None:
        return []
    with torch.no_grad():
        out = plain.forward(model, input_ids=torch.tensor([TOKENS]), use_cache=True, return_dict=True)
    cache = dict(out.items()).get(argument)  # asking `out` itself for the older name would print a warning
    if not isinstance(cache, DynamicCache):
        return []
    held = {f"{PAST}{i}_{slot}": tensor for i, layer in enumerate(cache.layers) for slot, tensor in _slots(layer).items()}
    specs = []
    for name, tensor in held.items():
        grows = name.endswith(GROWING)
        if not isinstance(tensor, Tensor) or (grows and (tensor.dim() != 4 or tensor.shape[2] != 2)):
            return []
        dims = ("batch", tensor.shape[1], "past", tensor.shape[3]) if grows else ("batch", *tensor.shape[1:])
        specs.append(InputSpec(name, str(tensor.dtype).removeprefix("torch."), dims))
    return specs if _goes_on_from(model, held) else []


def _goes_on_from(model: Any, held: Mapping[str, Tensor]) -> bool:
    """Whether every kind of state moves the next two tokens: Mamba's scan of more than one token starts from zero, whatever it is given."""
    plain = plain_class(model)

    def following(past: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out = plain.forward(model, **_model_kwargs(plain, {"input_ids": torch.tensor([TOKENS]), **past}), return_dict=True)
        y: Tensor = next(iter(out.values()))
        return y

    kinds = {(name.split("_", 5)[-1], t.shape) for name, t in held.items() if not name.endswith(GROWING)}
    plainly = following(held) if kinds else torch.empty(0)
    for kind, shape in kinds:
        moved = {name: t + 1 if name.endswith(kind) and t.shape == shape else t for name, t in held.items()}
        if torch.equal(following(moved), plainly):
            return False
    return True


def _slots(layer: Any) -> dict[str, Any]:
    """What one layer of a cache holds, by the names that transformers' exporter has; a layer of another kind holds None."""
    from transformers import cache_utils

    linear: Any = getattr(cache_utils, "LinearAttentionLayer", ())  # of later versions
    found: dict[str, Any] = {}
    if isinstance(layer, cache_utils.DynamicLayer):
        found |= {"keys": layer.keys, "values": layer.values}
    if isinstance(layer, linear):
        states = (("conv_states", layer.conv_states), ("recurrent_states", layer.recurrent_states))
        found |= {f"{kind}_{i}": state for kind, held in states for i, state in held.items() if state is not None}
    return found or {"": None}


def _layer(slots: Mapping[str, Tensor]) -> Any:
    """The inverse of `_slots`. Without the configuration every layer's keys grow, sliding ones too: the mask applies the window."""
    from transformers import cache_utils

    states = [slot.rpartition("_") for slot in slots if slot not in ("keys", "values")]
    layer: Any
    if not states:
        layer = cache_utils.DynamicLayer()  # type: ignore[no-untyped-call]
    else:
        both = cache_utils.LinearAttentionAndFullAttentionLayer if "keys" in slots else cache_utils.LinearAttentionLayer
        layer = both(number_of_states=1 + max(int(i) for *_, i in states))
    if "keys" in slots:
        layer.update(slots["keys"], slots["values"])
    for kind, _, i in states:
        value = slots[f"{kind}_{i}"].clone()  # which is written to in place
        getattr(layer, kind)[int(i)] = value
        getattr(layer, f"is_{kind}_initialized")[int(i)] = layer.has_previous_state[int(i)] = True
        if kind == "conv_states":
            layer.conv_kernel_size[int(i)] = value.shape[-1]
    return layer


def _cache_argument(plain: Any) -> str | None:
    """What the class's forward calls its cache."""
    accepted = inspect.signature(plain.forward).parameters
    return next((name for name in CACHES if name in accepted), None)


def plain_class(model: Any) -> Any:
    """The class as transformers wrote it."""
    return getattr(type(model), "_rewriter_plain", type(model))


def flatten(model: Any, specs: Sequence[InputSpec]) -> None:
    """Swap the forward for one that takes and returns plain tensors by name."""
    plain = plain_class(model)
    names = [spec.name for spec in specs]

    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        feeds = dict(zip(names, args, strict=False)) | kwargs
        _tie_dimensions(specs, feeds)
        return _plain_outputs(plain.forward(self, **_model_kwargs(plain, feeds), return_dict=True), feeds)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body = {"forward": forward, "_rewriter_plain": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    model.__class__ = type(plain.__name__, (plain,), body)


def _tie_dimensions(specs: Sequence[InputSpec], feeds: Mapping[str, Tensor]) -> None:
    """The same word is the same size: said once here, so that the graph has one symbol for it."""
    sizes: dict[str, Any] = {}
    for spec in specs:
        for size, dim in zip(feeds[spec.name].shape, spec.dims, strict=True):
            if isinstance(dim, str) and "+" not in dim:
                torch._check(size == sizes.setdefault(dim, size))
    for spec in specs:
        for size, dim in zip(feeds[spec.name].shape, spec.dims, strict=True):
            if isinstance(dim, str) and "+" in dim:
                torch._check(size == sum(sizes[word] for word in dim.split("+")))


def _model_kwargs(plain: Any, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {name: value for name, value in feeds.items() if not name.startswith(PAST)}
    past: dict[int, dict[str, Tensor]] = {}
    for name, value in feeds.items():
        if name.startswith(PAST):
            layer, _, slot = name.removeprefix(PAST).partition("_")
            past.setdefault(int(layer), {})[slot] = value
    if past:
        from transformers.cache_utils import DynamicCache

        argument, cache = _cache_argument(plain), DynamicCache()
        assert argument is not None
        cache.layers = [_layer(past[i]) for i in sorted(past)]
        return kwargs | {argument: cache, "use_cache": True}
    if "use_cache" in inspect.signature(plain.forward).parameters:
        kwargs["use_cache"] = False
    return kwargs


def _plain_outputs(out: Any, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in out.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif isinstance(value, (tuple, list)):
            flat |= {f"{name}_{i}": part for i, part in enumerate(value) if isinstance(part, Tensor)}
        elif hasattr(value, "layers") and any(feed.startswith(PAST) for feed in feeds):
            for i, layer in enumerate(value.layers):
                flat |= {f"{PRESENT}{i}_{slot}": state for slot, state in _slots(layer).items()}
    seen = {id(value) for value in feeds.values()}
    for name, value in flat.items():
        if id(value) in seen:  # one tensor under two names would lose one of them
            flat[name] = value.clone()
        seen.add(id(value))
    return flat


@contextmanager
def transformers_patches(model: Any) -> Iterator[None]:
    """transformers' own fixes of what torch.export cannot trace, where this version has them."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with ExitStack() as stack:
        try:
            from transformers.exporters.exporter_dynamo import reset_model_state
            from transformers.exporters.utils import apply_patches, patch_attribute
        except ImportError:
            pass
        else:
            stack.enter_context(apply_patches("dynamo"))
            stack.enter_context(reset_model_state(model))
            # its detour through the reference attention leaves copies in the graph that attention needs not
            stack.enter_context(patch_attribute(torch.nn.functional, "scaled_dot_product_attention", lambda _: sdpa))
        yield
