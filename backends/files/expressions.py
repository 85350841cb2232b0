"""Symbolic sizes are evaluated by sympy, which evaluates Python: each must parse to a small tree of known constructors.

Two grammars share one walker. `expr_str` (srepr: Mul(Integer(2), Symbol('s27', positive=True))) is sympified while a .pt2 loads;
`guards_code` (L['x'].size()[0] == 2*L['y'].size()[0]) becomes the source of a function when the program is turned into a module.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from functools import lru_cache

MAX_LENGTH = 10_000
MAX_DEPTH = 60
MAX_DIGITS = 20
MAX_DEGREE = 16  # exponents along one path, multiplied: what a power may be expanded to

SYMBOL = re.compile(r"(s|u|ps|zf|zuf)\d{1,6}")  # sizes, unbacked integers, floats: torch counts up to the number, so it is short
_ASSUMPTIONS = frozenset({"positive", "negative", "integer", "real", "nonnegative", "nonpositive", "nonzero", "zero", "finite", "infinite"})
_ASSUMPTIONS |= frozenset({"commutative", "extended_real", "rational", "extended_positive", "extended_negative", "even", "odd"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_CALLS = _POWERS | frozenset(  # one word a constructor
    """Integer Float Rational Add Mul Mod PythonMod FloorDiv CeilDiv CleanDiv ModularIndexing Max Min Abs floor ceiling sqrt
    CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal ToFloat Identity FloatTrueDiv IntTrueDiv Where Piecewise
    ExprCondPair IsNonOverlappingAndDenseIndicator And Or Not Xor Equality Unequality GreaterThan LessThan StrictGreaterThan
    StrictLessThan Eq Ne Ge Le Gt Lt""".split()  # noqa: SIM905
)
_GUARD_CALLS = frozenset({"Max", "Min", "max", "min", "abs", "Mod", "PythonMod", "FloorDiv", "CeilDiv"})
_GUARD_MATH = frozenset({"floor", "ceil", "trunc", "sqrt", "pow", "isnan", "inf"})
_NAMES = frozenset({"true", "false", "oo", "int_oo"})
_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.Not, ast.And, ast.Or,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_SAFE_STRING = re.compile(r"[\w .\-/]{1,200}")


@lru_cache(maxsize=65536)
def refuse_expression(text: str) -> str | None:
    """Why a symbolic expression of a .pt2 is not allowed, or None."""
    return _refuse(text, _Grammar(guard=False))


@lru_cache(maxsize=65536)
def refuse_guard(text: str) -> str | None:
    """Why a guard of a .pt2 is not allowed, or None."""
    return _refuse(text, _Grammar(guard=True))


class _Refused(Exception):
    """The first thing in an expression that the grammar does not have."""


def _refuse(text: str, grammar: _Grammar) -> str | None:
    if len(text) > MAX_LENGTH:
        return f"{len(text)} characters (at most {MAX_LENGTH})"
    if not text.isascii() or not text.isprintable():
        return "characters other than printable ASCII"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return f"a number of more than {MAX_DIGITS} digits"
    try:
        grammar.check(ast.parse(text.strip(), mode="eval").body, depth=0, degree=1)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "no expression"
    except _Refused as reason:
        return str(reason)
    return None


@dataclass(frozen=True)
class _Grammar:
    guard: bool

    def check(self, node: ast.expr, depth: int, degree: int) -> None:
        if depth > MAX_DEPTH:
            raise _Refused(f"nesting deeper than {MAX_DEPTH}")
        deeper = depth + 1
        match node:
            case ast.Constant(value=constant):
                if not isinstance(constant, bool | int | float):
                    raise _Refused(f"the constant {constant!r}")
            case ast.BinOp(left=left, op=op, right=right):
                self._operator(op)
                inner = degree * self._exponent(right, degree) if isinstance(op, ast.Pow) else degree
                self.check(left, deeper, inner)
                self.check(right, deeper, degree)
            case ast.UnaryOp(op=op, operand=operand):
                self._operator(op)
                self.check(operand, deeper, degree)
            case ast.BoolOp(values=values):
                for value in values:
                    self.check(value, deeper, degree)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                for comparison in ops:
                    self._operator(comparison)
                for value in (left, *rights):
                    self.check(value, deeper, degree)
            case ast.Call():
                self._call(node, deeper, degree)
            case ast.Tuple(elts=values) if not self.guard:
                for value in values:
                    self.check(value, deeper, degree)
            case ast.Name(id=name) if not self.guard:
                if not SYMBOL.fullmatch(name) and name not in _NAMES:
                    raise _Refused(f"the name {name}")
            case ast.Subscript() | ast.Attribute() if self.guard:
                self._source(node)
            case _:
                raise _Refused(f"{type(node).__name__} ({ast.unparse(node)[:60]})")

    def _operator(self, op: ast.AST) -> None:
        if not isinstance(op, _OPERATORS):
            raise _Refused(f"the operator {type(op).__name__}")

    def _exponent(self, node: ast.expr, degree: int) -> int:
        """A power needs a constant exponent, never one that is computed: Integer(2), 2, -1, Rational(1, 2)."""
        numbers = _constants(node)
        if not numbers:
            raise _Refused(f"a power whose exponent is no constant ({ast.unparse(node)[:60]})")
        largest = max(1, *(math.ceil(min(abs(number), MAX_DEGREE + 1)) for number in numbers))
        if largest * degree > MAX_DEGREE:
            raise _Refused(f"powers above {MAX_DEGREE}")
        return largest

    def _call(self, node: ast.Call, depth: int, degree: int) -> None:
        if self.guard:
            self._guard_call(node, depth, degree)
            return
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "Symbol":
            _symbol(node)
            return
        if name == "Float":
            _float(node)
            return
        if name not in _CALLS:
            raise _Refused(f"a call of {ast.unparse(node.func)[:60]}")
        for keyword in node.keywords:
            if keyword.arg != "evaluate" or not isinstance(keyword.value, ast.Constant):
                raise _Refused(f"the keyword {keyword.arg} of {name}")
        inner = degree
        if name in _POWERS:
            if len(node.args) != 2:
                raise _Refused(f"{name} of {len(node.args)} arguments")
            inner = degree * self._exponent(node.args[1], degree)
        for argument in node.args:
            self.check(argument, depth, inner)

    def _guard_call(self, node: ast.Call, depth: int, degree: int) -> None:
        if node.keywords:
            raise _Refused("a keyword")
        match node.func:
            case ast.Name(id=name) if name in _GUARD_CALLS:
                pass
            case ast.Attribute(value=ast.Name(id="math"), attr=name) if name in _GUARD_MATH and name != "pow":
                pass
            case ast.Attribute(value=source, attr="size" | "stride" | "storage_offset" | "item") if not node.args:
                self._source(source)
            case _:
                raise _Refused(f"a call of {ast.unparse(node.func)[:60]}")
        for argument in node.args:
            self.check(argument, depth, degree)

    def _source(self, node: ast.expr) -> None:
        """L['x'].size()[0], L['args'][0], math.inf: constant subscripts from L down, nothing else."""
        while True:
            match node:
                case ast.Name(id="L"):
                    return
                case ast.Attribute(value=ast.Name(id="math"), attr="inf"):
                    return
                case ast.Subscript(value=value, slice=ast.Constant(value=key)):
                    if type(key) is not int and not (type(key) is str and _SAFE_STRING.fullmatch(key)):
                        raise _Refused(f"the subscript {key!r}")
                    node = value
                case ast.Call(func=ast.Attribute(value=value, attr="size" | "stride" | "storage_offset"), args=[], keywords=[]):
                    node = value
                case _:
                    raise _Refused(f"{type(node).__name__} ({ast.unparse(node)[:60]})")


def _constants(node: ast.expr) -> list[float]:
    match node:
        case ast.Constant(value=int() | float() as value):
            return [value]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _constants(operand)
        case ast.Call(func=ast.Name(id="Integer" | "Rational" | "Float"), args=[_, *_] as values):
            parts = [_constants(value) for value in values]
            return [number for part in parts for number in part] if all(parts) else []
        case _:
            return []


def _symbol(node: ast.Call) -> None:
    match node.args:
        case [ast.Constant(value=str() as name)] if SYMBOL.fullmatch(name):
            pass
        case _:
            raise _Refused(f"the symbol {ast.unparse(node)[:60]}")
    for keyword in node.keywords:
        if keyword.arg not in _ASSUMPTIONS or not isinstance(keyword.value, ast.Constant) or keyword.value.value not in (True, False, None):
            raise _Refused(f"the assumption {keyword.arg}")


def _float(node: ast.Call) -> None:
    match node.args:
        case [ast.Constant(value=str() as text)] if re.fullmatch(r"[+-]?\d{1,20}(\.\d{0,80})?([eE][+-]?\d{1,3})?", text):
            pass
        case [ast.Constant(value=int() | float())]:
            pass
        case _:
            raise _Refused(f"the number {ast.unparse(node)[:60]}")
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg not in ("precision", "dps") or type(value) is not int or not 1 <= value <= 200:
            raise _Refused(f"the keyword {keyword.arg} of Float")
