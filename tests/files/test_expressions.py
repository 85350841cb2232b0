"""Sizes are what clean exports write: everything that sympy or Python could run, or could not finish, is refused by its grammar."""

from __future__ import annotations

import pytest

from rewriter.backends.files.expressions import refuse_expression, refuse_guard


def _syms(count: int) -> str:
    return ", ".join(f"s{i}" for i in range(count))


def _nested(form: str, levels: int) -> str:
    text = "s0"
    for level in range(1, levels + 1):
        text = form.format(text, level)
    return text


REFUSED: dict[str, tuple[str, str]] = {
    "root of a tiny fraction": ("Pow(Integer(3), Rational(1, 9.094947017729282e-13))", "exponent"),
    "Rational of a float": ("Rational(1, 9.094947017729282e-13)", "Rational of what is no integer"),
    "Integer of a float": ("Integer(1e200)", "Integer of what is no integer"),
    "rational exponent": ("Pow(s0, Rational(1, 2))", "exponent"),
    "float exponent": ("Pow(s0, 0.5)", "exponent"),
    "boolean exponent": ("Pow(s0, True)", "exponent"),
    "exponent": ("Pow(s0, Integer(17))", "powers above"),
    "tower": ("Pow(Pow(s0, 5), 5)", "powers above"),
    "operator tower": ("(s0**5)**5", "powers above"),
    "computed exponent": ("s0**s1", "exponent"),
    "FloatPow": ("FloatPow(ToFloat(s0), Float('40.5'))", "powers above"),
    "Max of many": (f"Max({_syms(1000)})", "Max and Min of more"),
    "Max of many Mod": (f"Max({', '.join(f'Mod(s{i}, 7)' for i in range(400))})", "Max and Min of more"),
    "Max here and there": (f"Add({', '.join(f'Max(s{i}, 1)' for i in range(40))})", "Max and Min of more"),
    "nested FloorDiv": (_nested("FloorDiv({0}, s{1})", 50), "nesting"),
    "nested //": (f"{'(' * 50}s0{'//s1)' * 50}", "nesting"),
    "nested Max": (_nested("Max({0}, s{1})", 12), "nesting"),
    "nested sums": (_nested("Add({0}, 1)", 120), "nesting"),
    "gcd of polynomials": (f"FloorDiv(Pow(Add({_syms(40)}), 16), Pow(Add({_syms(4)}), 15))", "terms"),
    "product of sums": (f"Mul({', '.join(['Add(s0, s1, s2, s3)'] * 6)})", "terms"),
    "operator product of sums": ("*".join(["(s0 + s1 + s2 - s3)"] * 6), "terms"),
    "CeilDiv in divisors": (_nested("CeilDiv(s{1}, {0})", 25), "parts"),
    "nested ceilings": (_nested("ceiling(CleanDiv({0}, s{1}))", 12), "parts"),
    "many parts": (f"Add({', '.join(['1'] * 600)})", "parts"),
    "large numbers": (f"Mul({', '.join(['Integer(99999999999999999999)'] * 300)})", "digits together"),
    "large numbers in a power": (f"Pow(Mul({', '.join(['Integer(99999999999999999999)'] * 20)}), 16)", "digits together"),
    "large floats": (f"Mul({', '.join(['1e300'] * 20)})", "digits together"),
    "large Float": (f"Mul({', '.join(['Float(' + repr('1e-300') + ')'] * 20)})", "digits together"),
    "infinite": ("1e999", "constant"),
    "infinite Float": ("Float('1e999')", "infinite"),
    "number of a Float": ("Float('nan')", "number"),
    "precision of a Float": ("Float('1.5', precision=100000)", "keyword precision"),
    "digits": (f"Integer({'9' * 21})", "digits"),
    "length": (f"s0{' ' * 10_000}", "characters"),
    "control character": ("s0\t+ 1", "printable"),
    "letter": ("s\u0660", "ASCII"),
    "parse error": ("s0+", "no expression"),
    "operator": ("1@2", "operator MatMult"),
    "bit operator": ("s0 ^ 2", "operator BitXor"),
    "unary operator": ("~s0", "operator Invert"),
    "comparison": ("s0 in s1", "operator In"),
    "keyword": ("Add(s0, x=1)", "keyword x"),
    "computed evaluate": ("Add(s0, evaluate=s1)", "keyword evaluate"),
    "double star": ("Add(s0, **s1)", "keyword"),
    "arity": ("Pow(s0)", "of 1 arguments"),
    "name": ("os", "name os"),
    "text": ("Add(s0, 'x')", "constant"),
    "lambda": ("(lambda: s0)()", "call of"),
    "call": ("sympify(s0)", "call of sympify"),
    "attribute": ("s0.func", "Attribute"),
    "starred": ("Add(*s0)", "Starred"),
    "symbol": ("Symbol('os')", "symbol"),
    "assumption": ("Symbol('s0', evil=True)", "assumption"),
    "value of an assumption": ("Symbol('s0', positive=7)", "assumption"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_expressions_outside_the_grammar_are_refused(name: str) -> None:
    text, reason = REFUSED[name]
    said = refuse_expression(text)
    assert said is not None and reason in said and "\n" not in said


GUARDS: dict[str, tuple[str, str]] = {
    "call": ("open('x')==1", "call of open"),
    "math call": ("math.comb(9,3)==1", "call of math.comb"),
    "math.pow": ("math.pow(9, 9) == 1", "call of math.pow"),
    "math name": ("math.pi == L['x'].size()[0]", "math"),
    "inf of another": ("torch.inf == 1", "Attribute"),
    "source": ("torch.x['a']==1", "Attribute"),
    "method of a source": ("L['x'].data.size()==1", "data"),
    "name": ("G['x'].size()[0] == 1", "Name (G)"),
    "bare name": ("x == 1", "name x"),
    "method": ("L['x'].numpy() == 1", "call of"),
    "method of a call": ("f(1)['x'].size() == 1", "Call"),
    "arguments of a method": ("L['x'].size(open('x')) == 1", "call of"),
    "arguments inside a source": ("L['x'].size(open('x'))[0] == 1", "Call"),
    "keyword": ("max(1, key=2) == 1", "keyword"),
    "keyword of a method": ("L['x'].size(dim=1) == 1", "keyword"),
    "subscript": ("L[L].size()[0] == 1", "Subscript"),
    "text of a subscript": ('L["it\'s"].size()[0] == 1', "subscript"),
    "boolean subscript": ("L[True] == 1", "subscript"),
    "tuple": ("(1, 2) == 1", "Tuple"),
    "operator": ("L['x'].size()[0] @ 2 == 1", "operator MatMult"),
    "power": ("L['x'].size()[0]**99 == 1", "powers above"),
    "computed power": ("2**L['x'].size()[0] == 1", "exponent"),
    "symbol": ("Symbol('s0') == 1", "call of Symbol"),
    "parts": (" and ".join(["1 == 1"] * 300), "parts"),
}


@pytest.mark.parametrize("name", GUARDS)
def test_guards_outside_the_grammar_are_refused(name: str) -> None:
    text, reason = GUARDS[name]
    said = refuse_guard(text)
    assert said is not None and reason in said and "\n" not in said


_SIZE = "Symbol('s16', positive=True, integer=True)"
ACCEPTED = (
    "Mul(Integer(2), Symbol('s27', positive=True))",
    f"Pow({_SIZE}, Integer(2))",
    f"Pow({_SIZE}, Integer(-1))",
    f"Mul(Rational(1, 2), {_SIZE})",
    "FloatPow(ToFloat(s0), Float('0.5', precision=53))",
    "2*s77 - 1",
    "(s0*s1)//(s2 + 1)",
    "Max(1, s0)",
    "Integer(9223372036854775807)",
    "StrictLessThan(Integer(-1), s0)",
    "-int_oo",
    "CeilToInt(IntTrueDiv(CeilToInt(IntTrueDiv(s0, Integer(2))), Integer(2)))",
    "CeilDiv(CeilDiv(CeilDiv(s0, 2), 2), 2)",
    _nested("Add(FloorDiv(Add({0}, Integer(-1)), Integer(2)), Integer(1))", 12),  # twelve strided convolutions
    f"Mul({', '.join(f'Max(Integer(1), Add(FloorDiv(s{i}, 4), 1))' for i in range(6))})",
)


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_exports_write_is_accepted(text: str) -> None:
    assert refuse_expression(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] == 2*L['y'].size()[0]",
        "math.floor(L['x'].size()[0]) <= math.inf",
        "max(L['x'].size()[0], 2)**2 != 0 and not L['x'].stride()[0] < 1",
        "L['args'][0].storage_offset() == 0",
        " and ".join(["1 + (((-1) + (((-1) + L['input'].size()[2]) // 2)) // 2) >= 1"] * 10),
    ],
)
def test_guards_that_exports_write_are_accepted(text: str) -> None:
    assert refuse_guard(text) is None
