"""Symbolic sizes are evaluated by sympy, which evaluates Python: each must parse to a small tree of known constructors.

Two grammars share one walker. `expr_str` (srepr: Mul(Integer(2), Symbol('s27', positive=True))) is sympified while a .pt2 loads;
`guards_code` (L['x'].size()[0] == 2*L['y'].size()[0]) becomes the source of a function when the program is turned into a module.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

# What sympy does with a small expression may take hours, so these bound its work; clean exports of the zoo hold a tenth of each or less.
MAX_LENGTH = 10_000
MAX_NODES = 500
MAX_DEPTH = 100
MAX_NESTING = 30  # functions inside functions, such as a FloorDiv for each strided convolution
MAX_COMPARED = 32  # operands of Max and Min: sympy compares them in pairs
MAX_NESTED_MAXIMA = 10  # flattened anew at every level
MAX_TERMS = 1000  # monomials if everything were multiplied out, which a polynomial gcd may do
MAX_DIGITS = 20
MAX_MAGNITUDE = 4000  # decimal digits of all numbers together, each times the power over it
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
_MAXIMA = frozenset({"Max", "Min", "max", "min"})
_COPIERS = frozenset(  # sympy writes or asks for an argument twice, CeilDiv as (a + b - 1) // b: nested ones double with every level
    """CeilDiv CleanDiv Abs floor ceiling sqrt CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal FloatTrueDiv IntTrueDiv
    Where Piecewise IsNonOverlappingAndDenseIndicator LShift RShift PowByNatural FloatPow""".split()  # noqa: SIM905
)
_SUMS = _MAXIMA | frozenset("Add And Or Not Xor Where Piecewise ExprCondPair Equality Unequality GreaterThan LessThan".split())  # noqa: SIM905
_SUMS |= frozenset("StrictGreaterThan StrictLessThan Eq Ne Ge Le Gt Lt Abs Identity".split())  # noqa: SIM905
_GUARD_CALLS = frozenset({"Max", "Min", "max", "min", "abs", "Mod", "PythonMod", "FloorDiv", "CeilDiv"})
_GUARD_MATH = frozenset({"floor", "ceil", "trunc", "sqrt", "isnan"})
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
        grammar.check(ast.parse(text.strip(), mode="eval").body, _At())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "no expression"
    except _Refused as reason:
        return str(reason)
    return None


@dataclass(frozen=True)
class _At:
    """Where a node stands: what is above it."""

    depth: int = 0
    degree: int = 1
    nesting: int = 0
    maxima: int = 0
    copies: int = 1

    def below(self) -> _At:
        return replace(self, depth=self.depth + 1)

    def powered(self, exponent: int) -> _At:
        return replace(self, degree=self.degree * exponent)

    def inside(self, name: str) -> _At:
        """Below a call of `name`; sums and products do not count as functions."""
        if name in ("Add", "Mul", "Integer", "Rational"):
            return self
        copies = self.copies * (2 if name in _COPIERS else 1)
        return replace(self, nesting=self.nesting + 1, maxima=self.maxima + (name in _MAXIMA), copies=copies)


class _Grammar:
    """One walk over one expression; `check` returns how many monomials the part under it has when multiplied out."""

    def __init__(self, guard: bool) -> None:
        self.guard = guard
        self._nodes = self._compared = self._magnitude = 0

    def check(self, node: ast.expr, at: _At) -> int:
        self._count(at)
        terms = self._terms(node, at.below())
        if terms > MAX_TERMS and not self.guard:
            raise _Refused(f"more than {MAX_TERMS} terms when multiplied out")
        return terms

    def _count(self, at: _At) -> None:
        self._nodes += at.copies
        if self._nodes > MAX_NODES:
            raise _Refused(f"more than {MAX_NODES} parts")
        if at.depth > MAX_DEPTH or at.nesting > MAX_NESTING or at.maxima > MAX_NESTED_MAXIMA:
            raise _Refused(f"nesting deeper than {MAX_DEPTH} ({MAX_NESTING} functions, {MAX_NESTED_MAXIMA} of them Max or Min)")

    def _terms(self, node: ast.expr, at: _At) -> int:
        match node:
            case ast.Constant(value=constant):
                self._number(constant, at.degree)
                return 1
            case ast.BinOp(op=op):
                self._operator(op)
                return self._binary(node, at)
            case ast.UnaryOp(op=op, operand=operand):
                self._operator(op)
                return self.check(operand, at)
            case ast.BoolOp(values=values):
                return sum(self._each(values, at))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                for comparison in ops:
                    self._operator(comparison)
                return sum(self._each([left, *rights], at))
            case ast.Call():
                return self._guard_call(node, at) if self.guard else self._call(node, at)
            case ast.Tuple(elts=values) if not self.guard:
                return sum(self._each(values, at))
            case ast.Name(id=name) if not self.guard and (SYMBOL.fullmatch(name) or name in _NAMES):
                return 1
            case ast.Name(id=name):
                raise _Refused(f"the name {name}")
            case ast.Subscript() | ast.Attribute() if self.guard:
                self._source(node)
                return 1
            case _:
                raise _Refused(f"{type(node).__name__} ({ast.unparse(node)[:60]})")

    def _each(self, values: list[ast.expr], at: _At) -> list[int]:
        return [self.check(value, at) for value in values]

    def _binary(self, node: ast.BinOp, at: _At) -> int:
        if isinstance(node.op, ast.Pow):
            exponent = self._exponent(node.right, at.degree, fractions=False)
            return self._raised(self.check(node.left, at.powered(exponent)), exponent)
        function = isinstance(node.op, ast.FloorDiv | ast.Mod)
        left, right = self._each([node.left, node.right], at.inside(type(node.op).__name__) if function else at)
        return left + right if isinstance(node.op, ast.Add | ast.Sub) else left * right

    def _raised(self, terms: int, exponent: int) -> int:
        return int(terms**exponent)

    def _number(self, value: object, degree: int) -> None:
        """An infinite constant is none that torch writes."""
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise _Refused(f"the constant {value!r}")
        self._digits(abs(math.log10(abs(value))) if value else 0, degree)

    def _digits(self, digits: float, degree: int) -> None:
        self._magnitude += (math.ceil(digits) + 1) * degree
        if self._magnitude > MAX_MAGNITUDE:
            raise _Refused(f"numbers of more than {MAX_MAGNITUDE} digits together")

    def _operator(self, op: ast.AST) -> None:
        if not isinstance(op, _OPERATORS):
            raise _Refused(f"the operator {type(op).__name__}")

    def _exponent(self, node: ast.expr, degree: int, fractions: bool) -> int:
        """A power needs a constant exponent, never one that is computed: Integer(2), 2, -1; FloatPow also has Float('0.5')."""
        number = _constant(node)
        if number is None or not (fractions or isinstance(number, int)):
            raise _Refused(f"a power whose exponent is no constant or no integer ({ast.unparse(node)[:60]})")
        largest = max(1, math.ceil(min(abs(number), MAX_DEGREE + 1)))
        if largest * degree > MAX_DEGREE:
            raise _Refused(f"powers above {MAX_DEGREE}")
        return largest

    def _call(self, node: ast.Call, at: _At) -> int:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "Symbol":
            _symbol(node)
            return 1
        if name == "Float":
            self._digits(_float(node), at.degree)
            return 1
        if name not in _CALLS:
            raise _Refused(f"a call of {ast.unparse(node.func)[:60]}")
        for keyword in node.keywords:
            if keyword.arg != "evaluate" or not isinstance(keyword.value, ast.Constant):
                raise _Refused(f"the keyword {keyword.arg} of {name}")
        return self._arguments(name, node.args, at.inside(name))

    def _arguments(self, name: str, args: list[ast.expr], at: _At) -> int:
        if name in ("Integer", "Rational") and not all(type(_constant(arg)) is int for arg in args):
            raise _Refused(f"the {name} of what is no integer")
        self._compare(name, args)
        if name not in _POWERS:
            terms = self._each(args, at)
            return sum(terms) if name in _SUMS else math.prod(terms)
        if len(args) != 2:
            raise _Refused(f"{name} of {len(args)} arguments")
        exponent = self._exponent(args[1], at.degree, fractions=name == "FloatPow")
        return self._raised(self.check(args[0], at.powered(exponent)), exponent)

    def _compare(self, name: str, args: list[ast.expr]) -> None:
        self._compared += len(args) if name in _MAXIMA else 0
        if self._compared > MAX_COMPARED:
            raise _Refused(f"Max and Min of more than {MAX_COMPARED} operands")

    def _guard_call(self, node: ast.Call, at: _At) -> int:
        if node.keywords:
            raise _Refused("a keyword")
        name = ""
        match node.func:
            case ast.Name(id=name) if name in _GUARD_CALLS:
                pass
            case ast.Attribute(value=ast.Name(id="math"), attr=name) if name in _GUARD_MATH:
                pass
            case ast.Attribute(value=source, attr="size" | "stride" | "storage_offset" | "item") if not node.args:
                self._source(source)
                return 1
            case _:
                raise _Refused(f"a call of {ast.unparse(node.func)[:60]}")
        self._compare(name, node.args)
        return sum(self._each(node.args, at.inside(name)))

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


def _constant(node: ast.expr) -> int | float | None:
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _constant(operand)  # the sign does not matter to what it costs
        case ast.Call(func=ast.Name(id="Integer"), args=[value], keywords=[]):
            inner = _constant(value)
            return inner if isinstance(inner, int) else None
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str() | int() | float() as text), *_]):
            _float(node)
            return float(text)
        case _:
            return None


def _symbol(node: ast.Call) -> None:
    match node.args:
        case [ast.Constant(value=str() as name)] if SYMBOL.fullmatch(name):
            pass
        case _:
            raise _Refused(f"the symbol {ast.unparse(node)[:60]}")
    for keyword in node.keywords:
        if keyword.arg not in _ASSUMPTIONS or not isinstance(keyword.value, ast.Constant) or keyword.value.value not in (True, False, None):
            raise _Refused(f"the assumption {keyword.arg}")


def _float(node: ast.Call) -> float:
    """How many digits it has before or behind its point."""
    match node.args:
        case [ast.Constant(value=str() as text)] if re.fullmatch(r"[+-]?\d{1,20}(\.\d{0,80})?([eE][+-]?\d{1,3})?", text):
            number = float(text)
        case [ast.Constant(value=int() | float() as plain)]:
            number = float(plain)
        case _:
            raise _Refused(f"the number {ast.unparse(node)[:60]}")
    if not math.isfinite(number):
        raise _Refused(f"the number {ast.unparse(node)[:60]}, which is infinite")
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg not in ("precision", "dps") or type(value) is not int or not 1 <= value <= 200:
            raise _Refused(f"the keyword {keyword.arg} of Float")
    return abs(math.log10(abs(number))) if number else 0.0
