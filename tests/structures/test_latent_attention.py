"""Attention on a latent: expanded, absorbed and by length, against keys and values written out; `by_length` in every interpretation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from rewriter.backends.counting import CountingOps
from rewriter.backends.eager import EagerOps
from rewriter.backends.fx.custom_op import TorchOps
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.target import as_module, lower
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.measure import stacked_maps
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.sequence_ops import lowerings
from rewriter.operator import AbstractMap, Dims, flatten, unflatten
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import ALWAYS, LatentAttention
from rewriter.passes.structures.latent_values import LatentValues
from rewriter.tolerances import EQUAL
from tests.structures.attentions import HEADS, KEYS, LOWEST, PAIRS, inputs
from tests.structures.inputs import Mapped, generator

MLA = Attention(heads=4, shared=4, key=8, width=3, scale=0.5)


def form(attention: Attention = MLA, rank: int = 6, rope: int = 5, memory: int | None = None, groups: int = 1) -> LatentAttention:
    """With latents of their own for values where `memory` is their rank."""
    key_up = torch.randn(attention.shared, attention.key - rope, rank, generator=generator(7))
    value_up = torch.randn(attention.shared, memory or rank, attention.width, generator=generator(8))
    return LatentAttention(attention, key_up, value_up, few=2, joint=memory is None, groups=groups)


def values(attention: Attention, groups: int) -> LatentValues:
    return LatentValues(attention, torch.randn(attention.shared, 6, attention.width, generator=generator(8)), few=2, groups=groups)


FORMS: dict[str, LatentAttention | LatentValues] = {
    "values alone": values(MLA, groups=2),
    "values alone, grouped": values(replace(MLA, shared=2, mask=PAIRS, boolean=True, empty="zero"), groups=2),
    "values alone, one latent": values(replace(MLA, shared=2, mask=PAIRS), groups=1),
    "mla": form(),
    "without a rotated part": form(rope=0),
    "two latents": form(memory=7),
    "grouped": form(replace(MLA, shared=2)),
    "a latent for two heads": form(rope=0, memory=7, groups=2),
    "and rotated, by head": form(groups=4),
    "and grouped": form(replace(MLA, shared=2, mask=PAIRS), groups=2),
    "causal": form(replace(MLA, causal=True)),
    "added": form(replace(MLA, mask=PAIRS)),
    "two added": form(replace(MLA, mask=KEYS, bias=HEADS)),
    "boolean, zero": form(replace(MLA, mask=PAIRS, boolean=True, empty="zero")),
    "boolean, finite, grouped": form(replace(MLA, shared=2, mask=KEYS, boolean=True, hidden=LOWEST)),
}
forms = pytest.mark.parametrize("name", FORMS)
LENGTHS = [(1, 6), (2, 5), (3, 3), (7, 9)]


def written_out(own: LatentAttention | LatentValues, query: Tensor, latent: Tensor, *rest: Tensor) -> Tensor:
    """The attention of expanded keys and values."""
    own = own.to(latent.dtype)
    others = list(rest)
    many = own.attention.shared // own.groups
    if isinstance(own, LatentValues):
        value = torch.einsum("bhsr,hrv->bhsv", others.pop(0).repeat_interleave(many, 1), own.value_up)
        return own.attention.apply(EagerOps(), query, latent, value, *others)[0]
    parts = [torch.einsum("bhsr,hnr->bhsn", latent.repeat_interleave(many, 1), own.key_up)]
    if own.rope:
        parts.append(others.pop(0).expand(-1, own.attention.shared, -1, -1))
    memory = latent if own.joint else others.pop(0)
    value = torch.einsum("bhsr,hrv->bhsv", memory.repeat_interleave(many, 1), own.value_up)
    return own.attention.apply(EagerOps(), query, torch.cat(parts, -1), value, *others)[0]


def close(got: Tensor, wanted: Tensor) -> None:
    rtol, atol = EQUAL[got.dtype]
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=rtol, atol=atol, equal_nan=True)


def given(own: AbstractMap, time: int = 4, keys: int = 6, batch: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random ones, masks as those of its attention."""
    sizes = {"batch": batch, "time": time, "keys": keys}
    attention = own.attention if isinstance(own, LatentAttention | LatentValues) else None
    held = {} if attention is None else dict(zip(attention.inputs(), inputs(attention, time, keys, batch, dtype), strict=True))
    shapes = {name: [n if isinstance(n, int) else sizes[n] for n in dims] for name, dims in own.inputs().items()}
    return [held[n] if n in held else torch.randn(shape, generator=generator(i)).to(dtype) for i, (n, shape) in enumerate(shapes.items())]


def session(own: AbstractMap, spelling: str, opset: int) -> Callable[..., Tensor]:
    """Under ONNX Runtime; an If where both ways are in it."""
    model = stacked_maps([own])
    model.graph.opset_imports[""] = opset
    attach(model, lambda spec, rank: spelling)
    check(model)
    (body,) = model.functions.values()
    assert ("If" in [node.op_type for node in body]) == (spelling in ("dispatched", "parted"))
    run = Session(ir.to_proto(model).SerializeToString(), 1)
    return lambda *xs: next(iter(run(dict(zip(own.inputs(), xs, strict=True))).values()))


@forms
def test_every_form_is_the_attention_of_expanded_keys_and_values(name: str) -> None:
    own = FORMS[name].to(torch.float64)
    for time, keys in LENGTHS:
        xs = given(own, time, keys)
        for spelling in own.forms():
            for ops in (EagerOps(), TorchOps()):
                close(own.spelled(spelling, ops, *xs)[0], written_out(own, *xs))


@pytest.mark.parametrize("opset", [18, 23])
@forms
def test_onnx_bodies_equal_it_at_every_length(name: str, opset: int) -> None:
    own = FORMS[name]
    for spelling in own.forms():
        run = session(own, spelling, opset)
        for time, keys in LENGTHS:
            xs = given(own, time, keys, dtype=torch.float32)
            close(run(*xs), written_out(own.to(torch.float64), *[x.double() if x.is_floating_point() else x for x in xs]))


def test_what_is_offered_is_what_few_says() -> None:
    """A target does not choose between them: each is for its own calls."""
    for few, wanted in ((0, "expanded"), (ALWAYS, "absorbed"), (3, "dispatched")):
        own = replace(FORMS["mla"], few=few)
        assert own.offered() == (wanted,) == lowerings(flatten(own)[1], contrib=True, opset=23)


def program(own: AbstractMap) -> torch.nn.Module:
    """Lowered to plain aten, its batch and lengths left open."""
    axes = tuple({i: Dim.AUTO for i, n in enumerate(dims) if isinstance(n, str)} for dims in own.inputs().values())
    xs = tuple(given(own, 4, 6, 3, torch.float32))
    return as_module(lower(FxGraph.of(torch.export.export(Mapped(own), xs, dynamic_shapes=(axes,)))))


def test_a_program_chooses_in_each_call() -> None:
    """One token too, which torch.export believes that there never is."""
    own = replace(FORMS["boolean, finite, grouped"], few=1)
    module = program(own)
    assert [str(node.target) for node in module.graph.nodes].count("cond") == 1  # type: ignore[union-attr, operator]
    for time, keys in LENGTHS:
        xs = given(own, time, keys, dtype=torch.float32)
        (got,) = module(*xs)
        close(got, written_out(own, *xs))


@dataclass(frozen=True)
class Parted(AbstractMap):
    """Up to `most` tokens times one stored vector, above times another: no two forms of one map, so that one sees which way was taken."""

    short: Tensor  # (n,)
    long: Tensor
    most: int

    def inputs(self) -> Mapping[str, Dims]:
        return {"x": ("batch", "time", len(self.short))}

    def outputs(self) -> Mapping[str, Dims]:
        return {"y": ("batch", "time", len(self.short))}

    def forms(self) -> tuple[str, ...]:
        return ("parted",)

    def spelled(self, form: str, ops: Any, *inputs: Any) -> tuple[Any, ...]:
        few, many = (lambda x, w=w: ops.mul(x, ops.const(w)) for w in (self.short, self.long))
        return (ops.by_length(inputs[0], -2, self.most, few, many, inputs),)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(5, generator=rng), torch.randn(5, generator=rng), 3)


def first_of(module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("where", ["eager", "counting", "onnx", "program"])
def test_by_length_takes_one_way_in_each_call(where: str, most: int) -> None:
    own = replace(Parted.random(generator(0)), most=most)
    run: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "eager": lambda: lambda x: own.apply(EagerOps(), x)[0],
        "counting": lambda: lambda x: own.apply(CountingOps(), x)[0],
        "onnx": lambda: session(own, "parted", 20),
        "program": lambda: first_of(program(own)),
    }
    call = run[where]()
    for time in (1, 2, 3, 4, 7):
        x = torch.randn(2, time, 5, generator=generator(time))
        close(call(x), x * (own.short if time <= most else own.long))


def test_costs_are_those_of_the_form_that_a_call_takes() -> None:
    own = replace(FORMS["mla"], few=3, cached=100)
    rank, rope, keys = 6, 5, 101
    absorbed = 2 * 4 * (3 * rank + keys * (rank + rope) + keys * rank + rank * 3)
    elementwise = 4 * keys * 3  # the sum of two products, the scale, the softmax
    assert own.cost(1).flops == absorbed + elementwise
    assert own.cost(1).params == own.key_up.numel() + own.value_up.numel()
    assert own.to(torch.bfloat16).cost(1).flops == own.cost(1).flops
    for count, few in ((3, ALWAYS), (4, 0)):
        assert own.cost(count) == replace(own, few=few).cost(count)


@forms
def test_a_spec_gives_it_back(name: str) -> None:
    leaves, spec = flatten(FORMS[name])
    assert flatten(unflatten(spec, leaves))[1] == spec
