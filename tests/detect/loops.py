"""Recurrences as people write them, each with the step that it repeats; and one of them in five spellings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch._higher_order_ops import scan
from torch.export import Dim, ExportedProgram

Step = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]
BATCH, TIME, HEADS, KEY, WIDTH = 2, 5, 3, 4, 6
NAMES = "abcdef"


def delta(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gated delta rule by products and sums."""
    q, k, v, beta, g = x
    state = state * g.exp()[..., None, None]
    update = (v - (k[..., None] * state).sum(-2)) * beta[..., None]
    state = state + k[..., None] * update[..., None, :]
    return state, (q[..., None] * state).sum(-2)


def transposed_delta(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same with the state as (value, key), by einsum, scaled."""
    q, k, v, beta, g = x
    state = state.transpose(-1, -2) * torch.sigmoid(g)[..., None, None]
    error = beta[..., None] * (v - torch.einsum("bhvk,bhk->bhv", state, k))
    state = state + torch.einsum("bhv,bhk->bhvk", error, k)
    return state.transpose(-1, -2), torch.einsum("bhvk,bhk->bhv", state, q * 0.5)


def product(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """DeltaProduct: two factors a token."""
    q, k, v, beta = x
    for j in range(2):
        error = (v[:, j] - torch.einsum("bhk,bhkv->bhv", k[:, j], state)) * beta[:, j, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, j], error)
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def folded(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The delta rule with beta in the key that is written."""
    q, k, v, beta = x
    error = v - torch.einsum("bhk,bhkv->bhv", k, state)
    state = state + torch.einsum("bhk,bhv->bhkv", beta[..., None] * k, error)
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def plain(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Linear attention without a decay."""
    q, k, v = x
    state = state + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return state, (q.unsqueeze(-2) @ state).squeeze(-2)


def skipping(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same beside its values, heads joined."""
    state, y = plain(state, x)
    return state, (0.5 * y + torch.tanh(x[2])).reshape(-1, HEADS * WIDTH)


class Retaining(torch.nn.Module):
    """RetNet: a decay for every head that is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = torch.nn.Parameter(1 - 2.0 ** -torch.arange(1.0, HEADS + 1))

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v = x
        state = self.decay[:, None, None] * state + k[..., None] * v[..., None, :]
        return state, torch.einsum("bhk,bhkv->bhv", q, state)


def fading(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A delta rule that forgets a tenth at every step."""
    q, k, v, beta = x
    state = 0.9 * state
    state = state + k[..., None] * ((v - torch.einsum("bhk,bhkv->bhv", k, state)) * beta[..., None])[..., None, :]
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def fading_slowly(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Linear attention that forgets by more than one operation before it writes."""
    q, k, v = x
    state = (0.9 * state.transpose(-1, -2)).transpose(-1, -2) / 1.5
    state = state + k[..., None] * v[..., None, :]
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def per_key(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gated linear attention (GLA): a decay for every entry of the key."""
    q, k, v, g = x
    state = state * torch.exp(g)[..., None] + k[..., None] * v[..., None, :]
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def ready(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gated linear attention whose decay comes as it is used."""
    q, k, v, decay = x
    state = state * decay[..., None] + k[..., None] * v[..., None, :]
    return state, torch.einsum("bhk,bhkv->bhv", q, state)


def gated(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """RG-LRU."""
    a, b = x
    state = torch.sigmoid(a) * state + b
    return state, state


def mamba(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mamba's scan as transformers writes it: decay and drive come in whole."""
    decay, drive, c = x
    state = decay * state + drive
    return state, (state @ c.unsqueeze(-1))[..., 0]


class Cell(torch.nn.Module):
    """h' = W u + U h + b, y = V h + D u: a linear RNN cell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.move = torch.nn.Linear(KEY, WIDTH), torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.read, self.skip = torch.nn.Linear(WIDTH, KEY), torch.nn.Linear(KEY, KEY, bias=False)

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        state = self.enter(x[0]) + self.move(state)
        return state, self.read(state) + self.skip(x[0])


class MinGru(torch.nn.Module):
    """Its gates are computed in the loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.gate, self.enter = torch.nn.Linear(KEY, WIDTH), torch.nn.Linear(KEY, WIDTH)

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        z = torch.sigmoid(self.gate(x[0]))
        state = (1 - z) * state + z * self.enter(x[0])
        return state, state


class Projecting(torch.nn.Module):
    """The delta rule with queries, keys, values and beta computed in the loop from one sequence."""

    def __init__(self, rows: int = -1) -> None:
        super().__init__()
        self.rows = rows
        torch.manual_seed(3)
        self.made = torch.nn.ModuleDict({n: torch.nn.Linear(6, HEADS * m) for n, m in (("q", KEY), ("k", KEY), ("v", WIDTH), ("beta", 1))})

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, beta = (made(x[0]).view(self.rows, HEADS, made.out_features // HEADS) for made in self.made.values())
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        return delta(state, [q, k, v, beta[..., 0].sigmoid(), 0 * beta[..., 0]])


class Selecting(torch.nn.Module):
    """Mamba's with the decay and what is written made in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(-1 - torch.arange(1.0 * KEY))

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        u, dt, b, c = x
        dt = torch.nn.functional.softplus(dt)
        state = torch.exp(dt[..., None] * self.a) * state + (dt * u)[..., None] * b[:, None]
        return state, (state @ c.unsqueeze(-1))[..., 0]


class Finishing(Selecting):
    """The same with a skip, a gate, a norm and an output projection in the loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.skip, self.out = torch.nn.Parameter(torch.rand(WIDTH)), torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = torch.nn.RMSNorm(WIDTH, eps=1e-5)

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        u, _, _, _, z = x
        state, y = super().forward(state, x[:4])
        return state, self.out(self.norm(y + self.skip * u) * torch.nn.functional.silu(z))


def elman(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Non-linear."""
    state = torch.tanh(x[0] + 0.5 * state)
    return state, state


@dataclass(frozen=True)
class Case:
    """A step, the shapes of its sequences at one step and of its state, and what it is."""

    step: Callable[[], Step] | Step
    shapes: tuple[tuple[int, ...], ...]
    state: tuple[int, ...]
    said: str  # in the report
    kind: str  # of operator; "" where it is not read

    def feeds(self, time: int = TIME, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        xs = [torch.rand(BATCH, time, *shape, generator=generator) - 0.5 for shape in self.shapes]
        state = torch.randn(BATCH, *self.state, generator=generator)
        return {**dict(zip(NAMES, xs, strict=False)), "state": state}

    @property
    def function(self) -> Step:
        return self.step() if isinstance(self.step, type) else self.step


_HK, _HV = (HEADS, KEY), (HEADS, WIDTH)
CASES = {
    "delta": Case(delta, (_HK, _HK, _HV, (HEADS,), (HEADS,)), (HEADS, KEY, WIDTH), "gated delta rule", "LinearAttention"),
    "transposed": Case(transposed_delta, (_HK, _HK, _HV, (HEADS,), (HEADS,)), (HEADS, KEY, WIDTH), "gated delta rule", "LinearAttention"),
    "folded": Case(folded, (_HK, _HK, _HV, (HEADS,)), (HEADS, KEY, WIDTH), "delta rule, 3 heads", "LinearAttention"),
    "product": Case(product, (_HK, (2, *_HK), (2, *_HV), (2, HEADS)), (HEADS, KEY, WIDTH), "product of 2 Householder", "LinearAttention"),
    "plain": Case(plain, (_HK, _HK, _HV), (HEADS, KEY, WIDTH), "linear attention", "LinearAttention"),
    "one head": Case(plain, ((KEY,), (KEY,), (WIDTH,)), (KEY, WIDTH), "linear attention, 1 head", "LinearAttention"),
    "retention": Case(Retaining, (_HK, _HK, _HV), (HEADS, KEY, WIDTH), "fixed-decay linear attention, 3 heads", "Retention"),
    "fading": Case(fading, (_HK, _HK, _HV, (HEADS,)), (HEADS, KEY, WIDTH), "fixed-decay delta rule", "Retention"),
    "slowly": Case(fading_slowly, (_HK, _HK, _HV), (HEADS, KEY, WIDTH), "fixed-decay linear attention", "Retention"),
    "per key": Case(per_key, (_HK, _HK, _HV, _HK), (HEADS, KEY, WIDTH), "per key entry", "LinearAttention"),
    "gated": Case(gated, ((WIDTH,), (WIDTH,)), (WIDTH,), "input-gated diagonal, 6 states", "DiagonalRecurrence"),
    "mamba": Case(mamba, (_HK, _HK, (KEY,)), (HEADS, KEY), "read by a query over 4", "DiagonalRecurrence"),
    "linear cell": Case(Cell, ((KEY,),), (WIDTH,), "time-invariant, 6 states, dense transition", "LinearSystem"),
    "min gru": Case(MinGru, ((KEY,),), (WIDTH,), "input-gated diagonal, 6 states", "DiagonalRecurrence"),
    "projecting": Case(Projecting, ((6,),), (HEADS, KEY, WIDTH), "gated delta rule", "LinearAttention"),
    "selecting": Case(Selecting, ((WIDTH,), (WIDTH,), (KEY,), (KEY,)), (WIDTH, KEY), "read by a query over 4", "DiagonalRecurrence"),
    "finishing": Case(
        Finishing, ((WIDTH,), (WIDTH,), (KEY,), (KEY,), (WIDTH,)), (WIDTH, KEY), "read by a query over 4", "DiagonalRecurrence"
    ),
    "skipping": Case(skipping, (_HK, _HK, _HV), (HEADS, KEY, WIDTH), "linear attention, 3 heads", "LinearAttention"),
    "elman": Case(elman, ((WIDTH,),), (WIDTH,), "non-linear in its state", ""),
}


class Loop(torch.nn.Module):
    """A Python loop over time."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.step = case.function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *xs, state = inputs
        ys = []
        for t in range(xs[0].shape[1]):
            state, y = self.step(state, [x[:, t] for x in xs])
            ys.append(y)
        return torch.stack(ys, 1), state


class Scan(torch.nn.Module):
    """torch's scan."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.step = case.function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *xs, state = inputs

        def body(carry: Tensor, row: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            new, y = self.step(carry, row)
            return new.clone(), y.clone()

        state, y = scan(body, state, [x.transpose(0, 1) for x in xs])
        return y.transpose(0, 1), state


@functools.cache
def exported(case: Case, dynamic: bool) -> ExportedProgram:
    """The loop unrolled, or the scan with dynamic batch and length; not to be edited."""
    inputs = tuple(case.feeds().values())
    torch._dynamo.reset()  # which traces a scan, and fixes sizes that did not vary among the scans that it saw before
    if not dynamic:
        return torch.export.export(Loop(case), inputs)
    axes = [{0: Dim.AUTO, 1: Dim.AUTO}] * len(case.shapes) + [{0: Dim.AUTO}]
    return torch.export.export(Scan(case), inputs, dynamic_shapes=(tuple(axes),))


def to_onnx(program: ExportedProgram) -> ir.Model:
    """As torch writes it."""
    found = torch.onnx.export(program, dynamo=True, verbose=False)
    assert found is not None
    return found.model


def onnx_loop(trips: int | None = None, stops: bool = False) -> ir.Model:
    """The gated delta rule as an ONNX Loop that gathers by its step; `trips`: a fixed count; `stops`: it may end early."""
    make = helper.make_node
    nodes = [make("Gather", [x, "i"], [f"{x}_t"], axis=1) for x in "abcde"]
    for name, axes in {"a23": [2, 3], "a3": [3], "a2": [2]}.items():
        nodes.append(make("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [len(axes)], axes)))
    nodes += [
        make("Exp", ["e_t"], ["decay"]),
        make("Unsqueeze", ["decay", "a23"], ["decay4"]),
        make("Mul", ["S", "decay4"], ["S1"]),
        make("Unsqueeze", ["b_t", "a2"], ["row"]),
        make("MatMul", ["row", "S1"], ["seen"]),
        make("Unsqueeze", ["c_t", "a2"], ["value"]),
        make("Sub", ["value", "seen"], ["error"]),
        make("Unsqueeze", ["d_t", "a23"], ["beta"]),
        make("Mul", ["error", "beta"], ["update"]),
        make("Unsqueeze", ["b_t", "a3"], ["column"]),
        make("MatMul", ["column", "update"], ["outer"]),
        make("Add", ["S1", "outer"], ["S2"]),
        make("Unsqueeze", ["a_t", "a2"], ["query"]),
        make("MatMul", ["query", "S2"], ["read"]),
        make("Squeeze", ["read", "a2"], ["y_t"]),
    ]
    if stops:
        nodes += [make("ReduceSum", ["read"], ["size"], keepdims=0), make("Less", ["size", "size"], ["again"])]
    else:
        nodes.append(make("Identity", ["going"], ["again"]))
    state = ["batch", HEADS, KEY, WIDTH]
    body = helper.make_graph(
        nodes,
        "body",
        [_info("i", [], TensorProto.INT64), _info("going", [], TensorProto.BOOL), _info("S", state)],
        [_info("again", [], TensorProto.BOOL), _info("S2", state), _info("y_t", ["batch", HEADS, WIDTH])],
    )
    outer = [
        make("Shape", ["a"], ["sizes"]),
        make("Constant", [], ["one"], value=helper.make_tensor("one", TensorProto.INT64, [], [1])),
        make("Gather", ["sizes", "one"], ["T"])
        if trips is None
        else make("Constant", [], ["T"], value=helper.make_tensor("T", TensorProto.INT64, [], [trips])),
        make("Constant", [], ["true"], value=helper.make_tensor("true", TensorProto.BOOL, [], [True])),
        make("Loop", ["T", "true", "state"], ["last", "ys"], body=body),
        make("Transpose", ["ys"], ["y"], perm=[1, 0, 2, 3]),
    ]
    sequences = [_info(x, ["batch", "time", HEADS, n]) for x, n in zip("abc", (KEY, KEY, WIDTH), strict=True)]
    sequences += [_info(x, ["batch", "time", HEADS]) for x in "de"]
    graph = helper.make_graph(
        outer, "loop", [*sequences, _info("state", state)], [_info("y", ["batch", "time", HEADS, WIDTH]), _info("last", state)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def _info(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
