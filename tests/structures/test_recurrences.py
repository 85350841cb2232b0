"""Laws of every recurrence: forms agree with the step-by-step oracle, a cut sequence gives what the whole gives, lowerings are equal."""

from __future__ import annotations

import itertools
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from rewriter.backends.eager import EagerOps
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.target import as_module, lower
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.measure import examples, stacked_maps
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.sequence_ops import lowerings
from rewriter.operator import AbstractOperator, AbstractRecurrence, flatten, unflatten
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.linear_system import ChunkedSystem, LinearSystem, chunked, conjugate_pairs
from rewriter.registry import load_structures
from rewriter.tolerances import EQUAL
from tests.structures.inputs import Mapped

load_structures()
OPS = EagerOps()
RECURRENCES = sorted(name for name, kind in AbstractOperator.kinds.items() if issubclass(kind, AbstractRecurrence))
LENGTHS = (1, 5, 64, 131)
SHARING = ((2, 2, 2), (2, 4, 1), (4, 2, 2), (3, 1, 3))  # heads, queries, keys


def random(name: str, seed: int = 3) -> AbstractRecurrence:
    kind = AbstractOperator.kinds[name]
    assert issubclass(kind, AbstractRecurrence)
    return kind.random(torch.Generator().manual_seed(seed))


def double(operator: AbstractRecurrence) -> AbstractRecurrence:
    """In float64, matrices of chunks made there."""
    if isinstance(operator, ChunkedSystem):
        return chunked(operator.system.to(torch.float64), operator.length)
    return operator.to(torch.float64)


def feeds(operator: AbstractRecurrence, tokens: int, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Inputs as they occur: unit keys, beta in [0, 2]."""
    torch.manual_seed(seed)
    found = examples(operator, tokens, batch)
    if isinstance(operator, LinearAttention):
        found["key"] = torch.nn.functional.normalize(found["key"].unflatten(-1, (-1, operator.key)), dim=-1).flatten(-2)
        found = {name: 2 * x.sigmoid() if name == "beta" else x for name, x in found.items()}
    elif "decay" in found:
        found["decay"] = found["decay"].exp()
    return {name: x.to(dtype) for name, x in found.items()}


def close(a: Tensor, b: Tensor) -> None:
    rtol, atol = EQUAL[b.dtype]
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", ["", "head"])
@pytest.mark.parametrize("rule", ["delta", "plain"])
@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_chunks_equal_the_steps(factors: int, rule: str, decay: str, dtype: torch.dtype) -> None:
    for (heads, queries, keys), batch, tokens in itertools.product(SHARING, (1, 3), (7, 65)):
        form = LinearAttention(heads, 5, 3, queries, keys, factors, rule, decay, 0.4)
        given = feeds(form, tokens, batch, dtype)
        for a, b in zip(form.spelled("chunked", OPS, *given.values()), form.spelled("sequential", OPS, *given.values()), strict=True):
            close(a, b)


@pytest.mark.parametrize("reset", [-1e2, -1e3, -1e5, -1e8, -float("inf")])
@pytest.mark.parametrize(("rule", "factors"), [("delta", 1), ("delta", 2), ("plain", 1)])
def test_a_reset_forgets_and_leaves_what_follows_as_exact(rule: str, factors: int, reset: float) -> None:
    """Decays after it are sums of their own, no differences of sums that the reset made large."""
    form = LinearAttention(2, 5, 3, 4, 1, factors, rule, "head", 0.5)
    given = feeds(form, 70, 2)
    given["decay"][:, [3, 40]] = reset
    results = {name: form.spelled(name, OPS, *given.values()) for name in form.forms()}
    model = stacked_maps([form])
    attach(model, lambda *_: "chunked")
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    results["onnx"] = tuple(session(given).values())
    for found in results.values():
        for a, b in zip(found, results["sequential"], strict=True):
            close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_run_in_chunks(dtype: torch.dtype) -> None:
    form = LinearAttention(2, 5, 3, 2, 2, 1, "delta", "head", 0.5)
    given = feeds(form, 40, 2, dtype)
    for a, b in zip(form.spelled("chunked", OPS, *given.values()), form.spelled("sequential", OPS, *given.values()), strict=True):
        assert a.dtype == dtype
        close(a, b)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 140), st.booleans(), st.integers(0, 99))
def test_any_shape(heads: int, key: int, width: int, factors: int, tokens: int, decay: bool, seed: int) -> None:
    form = LinearAttention(heads, key, width, heads, heads, factors, "delta", "head" if decay else "")
    given = feeds(form, tokens, 2, torch.float64, seed)
    for a, b in zip(form.spelled("chunked", OPS, *given.values()), form.spelled("sequential", OPS, *given.values()), strict=True):
        close(a, b)


def test_correlated_keys_do_not_explode() -> None:
    """Where (I + L)^-1 as a series of powers is off by hundreds."""
    form = LinearAttention(2, 64, 16, 2, 2)
    given = feeds(form, 256, 1)
    shared = torch.nn.functional.normalize(torch.randn(64), dim=0)
    keys = given["key"].unflatten(-1, (2, 64)) * 0.3 + shared
    given["key"] = torch.nn.functional.normalize(keys, dim=-1).flatten(-2)
    given["beta"] = torch.full_like(given["beta"], 2.0)
    want = form.spelled("sequential", OPS, *(x.double() for x in given.values()))
    for lowering in lowerings(flatten(form)[1], contrib=True):
        for a, b in zip(_onnx(form, lowering)(given).values(), want, strict=True):
            close(a, b.float())


def test_a_delta_rule_is_a_product_of_householder_factors() -> None:
    """S_t = prod_j (I - beta_j k_j k_j^T) S_{t-1} where nothing is written."""
    form = LinearAttention(1, 6, 4, 1, 1, factors=3)
    given = {name: x.double() for name, x in feeds(form, 1, 1).items()}
    given["value"] = torch.zeros_like(given["value"])
    _, state = form.spelled("sequential", OPS, *given.values())
    want = given["state"][0, 0]
    for k, beta in zip(given["key"].reshape(3, 6), given["beta"].reshape(3), strict=True):
        want = want - beta * torch.outer(k, k) @ want
    close(state[0, 0], want)


@pytest.mark.parametrize("name", RECURRENCES)
def test_forms_equal_the_oracle(name: str) -> None:
    operator = double(random(name))
    for tokens, batch in itertools.product(LENGTHS, (1, 3)):
        given = feeds(operator, tokens, batch, torch.float64)
        want = operator.spelled(operator.forms()[0], OPS, *given.values())
        for form in operator.forms():
            for a, b in zip(operator.spelled(form, OPS, *given.values()), want, strict=True):
                close(a, b)


@pytest.mark.parametrize("name", RECURRENCES)
def test_scanning_the_step_is_the_oracle(name: str) -> None:
    operator = random(name)
    given = list(feeds(operator, 4, 2).values())
    count = len(operator.sequences())
    xs, states = given[:count], given[count:]
    rows = []
    for t in range(4):
        states, ys = operator.step(OPS, states, [x[:, t] for x in xs])
        rows.append(ys)
    *found, last = operator.spelled("sequential", OPS, *given)
    close(last, states[0])
    close(found[0], torch.stack([ys[0] for ys in rows], 1))


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_sequence_in_two_pieces_is_one(name: str) -> None:
    operator = random(name)
    given = feeds(operator, 73, 2)
    names, count = list(given), len(operator.sequences())
    for form in operator.forms():
        *ys, state = operator.spelled(form, OPS, *given.values())
        first = {n: x[:, :40] if n in names[:count] else x for n, x in given.items()}
        *ys1, middle = operator.spelled(form, OPS, *first.values())
        second = {n: x[:, 40:] if n in names[:count] else middle for n, x in given.items()}
        *ys2, last = operator.spelled(form, OPS, *second.values())
        close(last, state)
        close(torch.cat([ys1[0], ys2[0]], 1), ys[0])


@pytest.mark.parametrize("name", RECURRENCES)
def test_without_a_first_state_it_is_zero(name: str) -> None:
    operator = random(name)
    operator = operator.system if isinstance(operator, ChunkedSystem) else operator
    given = feeds(operator, 9, 2)
    zeroed = {n: torch.zeros_like(x) if n == "state" else x for n, x in given.items()}
    bare = replace(operator, carried=False)  # type: ignore[type-var]
    without = [x for n, x in given.items() if n != "state"]
    for a, b in zip(bare.apply(OPS, *without), operator.apply(OPS, *zeroed.values()), strict=True):
        close(a, b)
    session = _onnx(bare, bare.forms()[-1])
    for a, b in zip(session({n: x for n, x in given.items() if n != "state"}).values(), bare.apply(OPS, *without), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", RECURRENCES)
def test_gradients(name: str) -> None:
    """Through every form, as through the oracle."""
    operator = double(random(name))
    grads = []
    for form in operator.forms():
        given = [x.requires_grad_() for x in feeds(operator, 9, 2, torch.float64).values()]
        outputs = operator.spelled(form, OPS, *given)
        weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
        grads.append(torch.autograd.grad(outputs, given, weights))
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            close(a, b)


@pytest.mark.parametrize("opset", [18, 20, 23, 25])
@pytest.mark.parametrize("name", RECURRENCES)
def test_onnx_bodies_equal_eager(name: str, opset: int) -> None:
    operator = random(name)
    for lowering in lowerings(flatten(operator)[1], contrib=True):
        session = _onnx(operator, lowering, opset)
        for tokens, batch in ((1, 1), (7, 3), (64, 1), (130, 2)):
            given = feeds(operator, tokens, batch)
            for a, b in zip(session(given).values(), operator.spelled(operator.forms()[0], OPS, *given.values()), strict=True):
                close(a, b)


def test_a_last_state_that_nobody_reads_is_not_computed() -> None:
    operator = random("ChunkedSystem")
    model = stacked_maps([operator, operator])
    model.graph.outputs.pop()  # the second one's state
    attach(model, lambda spec, rank: "chunked")
    check(model)
    scans = [[n.op_type for n in f.all_nodes()].count("Scan") for f in model.functions.values()]
    assert scans == [2, 1]  # chunks, and the last steps one by one for their state
    given = feeds(operator, 13, 3)
    y, state = operator.spelled("sequential", OPS, *given.values())
    for a, b in zip(Session(ir.to_proto(model).SerializeToString(), 1)(given).values(), (y, state, y), strict=True):
        close(a, b)


@pytest.mark.parametrize("rule", ["delta", "plain"])
@pytest.mark.parametrize("decay", ["", "head", "key"])
@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_the_contrib_operator_takes_every_case(factors: int, decay: str, rule: str) -> None:
    for heads, queries, keys in SHARING:
        form = LinearAttention(heads, 8, 4, queries, keys, factors, rule, decay, 0.3)
        session = _onnx(form, "contrib")
        for tokens, batch in ((1, 1), (33, 3)):
            given = feeds(form, tokens, batch)
            for a, b in zip(session(given).values(), form.spelled("sequential", OPS, *given.values()), strict=True):
                close(a, b)


def test_double_precision_never_takes_the_single_precision_operator() -> None:
    form = LinearAttention(2, 4, 3, 2, 2)
    model = stacked_maps([form], torch.float64)
    attach(model, lambda spec, rank: "contrib")
    assert not [n for f in model.functions.values() for n in f.all_nodes() if n.domain == "com.microsoft"]
    given = feeds(form, 70, 2, torch.float64)
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    for a, b in zip(session(given).values(), form.spelled("sequential", OPS, *given.values()), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_program_of_any_length(name: str) -> None:
    """One opaque node when exported; plain aten and torch's scan when lowered; equal at every length."""
    operator = random(name)
    axes = tuple({0: Dim.AUTO, 1: Dim.AUTO} if d[1] == "time" else {0: Dim.AUTO} for d in operator.inputs().values())
    program = torch.export.export(Mapped(operator), tuple(feeds(operator, 70, 2).values()), dynamic_shapes=(axes,))
    graph = FxGraph.of(program)
    assert [graph.op(n) for n in graph.nodes()].count("structured") == 1
    module = as_module(lower(graph))
    for tokens, batch in ((3, 1), (64, 3), (129, 2)):
        given = feeds(operator, tokens, batch)
        for a, b in zip(module(*given.values()), operator.spelled(operator.forms()[0], OPS, *given.values()), strict=True):
            close(a, b)


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_spec_gives_the_operator_back(name: str) -> None:
    operator = random(name)
    leaves, spec = flatten(operator)
    assert flatten(unflatten(spec, leaves))[1] == spec


@pytest.mark.parametrize("name", RECURRENCES)
def test_costs_grow_with_the_tokens(name: str) -> None:
    operator = random(name)
    one, many = operator.cost(1), operator.cost(256)
    assert one.params == many.params == sum(leaf.numel() for leaf in flatten(operator)[0])
    assert 0 < one.flops <= many.flops


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.integers(1, 50), st.integers(0, 99))
def test_chunks_of_any_system(n: int, p: int, q: int, length: int, tokens: int, seed: int) -> None:
    from rewriter.algebra import Dense

    g = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((n, n), (p, n), (n, q), (p, q)))
    system = LinearSystem(Dense(a / (1 + torch.linalg.matrix_norm(a, 2))), Dense(b), Dense(c), Dense(d), b[0], d[0])
    given = feeds(system, tokens, 2, torch.float64)
    made = chunked(system, length)
    for x, y in zip(made.spelled("chunked", OPS, *given.values()), system.spelled("sequential", OPS, *given.values()), strict=True):
        close(x, y)


def test_a_bank_of_channels_keeps_its_channels_apart() -> None:
    """S4D: one state space for each channel, and matrices of a chunk that are block diagonal."""
    from rewriter.algebra import BlockDiagonal, Diagonal

    torch.manual_seed(0)
    keep, cross, partner = torch.tensor([0.6, 0.6, 0.7]), torch.tensor([-0.3, 0.3, 0.0]), torch.tensor([1, 0, 2])
    move = conjugate_pairs(keep.repeat(4), cross.repeat(4), torch.cat([partner + 3 * i for i in range(4)]))
    bank = LinearSystem(move, BlockDiagonal(torch.randn(4, 1, 3)), BlockDiagonal(torch.randn(4, 3, 1)), Diagonal(torch.randn(4)))
    made = chunked(bank, 8)
    assert isinstance(made.toeplitz, BlockDiagonal) and made.toeplitz.blocks.shape == (4, 8, 8)
    given = feeds(bank, 21, 2)
    for x, y in zip(made.apply(OPS, *given.values()), bank.apply(OPS, *given.values()), strict=True):
        close(x, y)


def _onnx(operator: AbstractRecurrence, lowering: str, opset: int = 20) -> Session:
    model = stacked_maps([operator])
    model.graph.opset_imports[""] = opset
    attach(model, lambda spec, rank: lowering)
    check(model)
    return Session(ir.to_proto(model).SerializeToString(), 1)
