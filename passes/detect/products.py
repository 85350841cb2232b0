"""Every spelling of a product of two values that vary, by letters: matmul, einsum, linear, addmm, Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from rewriter.graph import Graph, Node, Value
from rewriter.passes.detect.axes import Axes, Group, fresh
from rewriter.passes.detect.spellings import letters, read


@dataclass(frozen=True)
class Product:
    """out = scale * left right, summed over the letters that it lacks, + added."""

    node: Node
    operands: tuple[Value, Value]
    terms: tuple[str, str]
    out: str
    scale: float = 1.0
    added: Value | None = None

    def operand_axes(self, graph: Graph, out: Axes) -> tuple[Axes, Axes] | None:
        """The operands' axes from the result's; None where one is summed alone. What both are summed over gets a new atom."""
        known = dict(zip(self.out, out, strict=True))
        sizes = [graph.shape(v) or () for v in self.operands]
        for letter, made in zip(self.terms[0], fresh(sizes[0]), strict=True):
            if letter not in self.out:
                known[letter] = made
        if any(c not in known for c in self.terms[1]) or any(c not in self.terms[1] for c in self.terms[0] if c not in self.out):
            return None
        left, right = (tuple(_of(known[c], n) for c, n in zip(t, s, strict=True)) for t, s in zip(self.terms, sizes, strict=True))
        return left, right

    def other_axes(self, graph: Graph, which: int, axes: Axes) -> tuple[Axes, Axes]:
        """The axes of the other operand and of the result, from those of one."""
        own, other = self.terms[which], self.terms[1 - which]
        known: dict[str, Group] = dict(zip(own, axes, strict=True))
        sizes = graph.shape(self.operands[1 - which]) or ()
        for letter, n, made in zip(other, sizes, fresh(sizes), strict=True):
            if n != 1 and not known.get(letter):
                known[letter] = made
            known.setdefault(letter, ())
        return tuple(_of(known[c], n) for c, n in zip(other, sizes, strict=True)), tuple(known[c] for c in self.out)


def _of(group: Group, size: int | str) -> Group:
    """An axis of length 1 is repeated along the others'."""
    return () if size == 1 else group


def is_product(graph: Graph, node: Node | None) -> bool:
    """Whether two values that vary are multiplied, of whatever shapes."""
    op = "" if node is None else graph.op(node)
    if node is None or op not in _READERS or read(graph, node) is not None:
        return False
    pair = _pair(graph, node)
    return len(pair) == 2 and all(v is not None and not graph.is_const(v) for v in pair)


def _pair(graph: Graph, node: Node) -> list[Value | None]:
    inputs = list(graph.inputs(node))
    return inputs[1:3] if graph.op(node) == "addmm" else inputs[:2]


def product(graph: Graph, node: Node | None) -> Product | None:
    """The node as such a product, None where it is none, or its shapes are unknown."""
    if node is None or not is_product(graph, node) or not all(graph.shape(v) for v in _pair(graph, node)):
        return None
    found: Product | None = _READERS[graph.op(node)](graph, node, list(graph.inputs(node)))
    return found


def _matmul(graph: Graph, node: Node, inputs: list[Any], flips: tuple[bool, bool] = (False, False)) -> Product | None:
    a, b = inputs[:2]
    ranks = len(graph.shape(a) or ()), len(graph.shape(b) or ())
    if min(ranks) < 2:
        return None
    batch = ascii_letters[: max(ranks) - 2]
    left, right = ("xy" if not flips[0] else "yx"), ("yz" if not flips[1] else "zy")
    terms = (batch[len(batch) - ranks[0] + 2 :] + left, batch[len(batch) - ranks[1] + 2 :] + right)
    return Product(node, (a, b), terms, f"{batch}xz")


def _linear(graph: Graph, node: Node, inputs: list[Any]) -> Product | None:
    if len(inputs) > 2 and inputs[2] is not None:
        return None
    return _matmul(graph, node, inputs, flips=(False, True))


def _added(graph: Graph, node: Node, c: Value | None, plain: Product | None) -> Product | None:
    given = graph.attributes(node)
    if plain is None or (c is not None and given["beta"] not in (0, 1)):
        return None
    added = c if given["beta"] != 0 else None
    return Product(node, plain.operands, plain.terms, plain.out, float(given["alpha"]), added)


def _addmm(graph: Graph, node: Node, inputs: list[Any]) -> Product | None:
    return _added(graph, node, inputs[0], _matmul(graph, node, inputs[1:3]))


def _gemm(graph: Graph, node: Node, inputs: list[Any]) -> Product | None:
    given = graph.attributes(node)
    flips = bool(given["trans_a"]), bool(given["trans_b"])
    return _added(graph, node, inputs[2] if len(inputs) > 2 else None, _matmul(graph, node, inputs, flips=flips))


def _einsum(graph: Graph, node: Node, inputs: list[Any]) -> Product | None:
    if len(inputs) != 2:
        return None
    terms, out = letters(str(graph.attributes(node)["equation"]), [len(graph.shape(v) or ()) for v in inputs])
    if any(len(set(t)) < len(t) for t in (*terms, out)) or not set(out) <= set(terms[0] + terms[1]):
        return None
    return Product(node, (inputs[0], inputs[1]), (terms[0], terms[1]), out)


_READERS: dict[str, Any] = {
    "matmul": _matmul,
    "linear": _linear,
    "com.microsoft.FusedMatMul": lambda graph, node, inputs: None,  # nothing here computes it
    "addmm": _addmm,
    "gemm": _gemm,
    "einsum": _einsum,
}
