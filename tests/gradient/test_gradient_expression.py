"""Derivatives by three methods that share no code agree, and mistakes are reported."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.gradient import methods
from trainer.gradient.comparison import derive
from trainer.gradient.expression import parse, parse_values

METHODS = ["tf.GradientTape", "symbolic (sympy)", "central differences"]


def numbers(document: dict[str, Any], method: str = METHODS[0]) -> list[float]:
    """Returns the derivatives by a method, in the order of the document."""
    return list(document["methods"][method].values())[1:]


def derivatives(text: str, at: str, wrt: str | None = None, order: int = 1) -> list[float]:
    """Returns the derivatives that all three methods agree on."""
    result = derive(text, at=at, wrt=wrt, order=order)
    assert result.passed, result.verdict
    assert list(result.document["methods"]) == METHODS
    return numbers(result.document)


def test_the_default_prints_ten_three_ways(command: Callable[..., Any], in_tmp_path: Path) -> None:
    code, out, err = command("gradient")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    shown = [row for row in rows if row[-2:] == ["27", "10"]]
    assert [row[0] for row in shown] == ["tf.GradientTape", "symbolic", "central"]
    assert "d/dw = 2*a*w + b" in out
    assert "the three agree" in out
    assert "tape.watch" in out
    (run,) = (in_tmp_path / "runs").iterdir()
    assert run.name.endswith("-gradient")
    assert f"saved in runs/{run.name}" in out
    document = json.loads((run / "gradient.json").read_text())
    assert document["methods"]["tf.GradientTape"] == {"value": 27, "d/dw": 10}
    (events,) = run.glob("*.tfevents.*")
    written = list(tf.compat.v1.train.summary_iterator(str(events)))
    graphs = [tf.compat.v1.GraphDef.FromString(e.graph_def) for e in written if e.graph_def]
    names = {node.name.split("/")[0] for node in graphs[0].node}
    assert {"w", "expression", "derivative_1"} <= names
    texts = [value for event in written for value in event.summary.value]
    assert [text.tag for text in texts] == ["gradient"]
    assert b"| tf.GradientTape | 27 | 10 |" in texts[0].tensor.string_val[0]


def test_json_is_one_document(command: Callable[..., Any], in_tmp_path: Path) -> None:
    code, out, _ = command(
        *("gradient", "w**3", "--at", "w=2", "--order", "2", "--json", "--runs", "here")
    )
    found = json.loads(out)
    assert (code, found["formulas"], found["agree"]) == (0, {"d2/dw2": "6*w"}, True)
    assert [method["d2/dw2"] for method in found["methods"].values()] == pytest.approx([12] * 3)
    assert (in_tmp_path / found["run"] / "gradient.json").is_file()


# Defined for every argument.
_GUARDED = [
    *("log(2 + cos({}))", "sqrt(1.5 + sin({}))", "asin(0.5 * sin({}))", "acos(0.5 * cos({}))"),
    *("tan(0.5 * sin({}))", "sinh(tanh({}))", "cosh(tanh({}))", "-({})", "({})**2", "({})**-1"),
    *("abs(0.3 + {})", "relu({})", "(2 + sin({}))**1.5", "+({})"),
]
_PAIRS = [
    *("({} + {})", "({} - {})", "({} * {})", "({} / (2 + cos({})))", "maximum({}, {})"),
    *("minimum({}, {})", "(2 + tanh({}))**sin({})"),
]


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    functions = st.sampled_from(["exp", "sin", "cos", "atan", "tanh", "sigmoid", "softplus"])
    guarded = st.sampled_from(_GUARDED)
    pairs = st.sampled_from(_PAIRS)
    return (
        st.builds("{}({})".format, functions, inner)
        | st.builds(str.format, guarded, inner)
        | st.builds(str.format, pairs, inner, inner)
    )


EXPRESSIONS = st.recursive(st.sampled_from(["x", "y", "pi", "e", "2", "0.7"]), _grown, max_leaves=5)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    text=EXPRESSIONS,
    x=st.floats(-2, 2).map(lambda number: round(number, 3)),
    y=st.floats(-2, 2).map(lambda number: round(number, 3)),
)
def test_drawn_expressions_agree(text: str, x: float, y: float) -> None:
    try:
        result = derive(text, at=f"x={x},y={y}", wrt="x,y")
    except InputError as error:
        assert any(words in str(error) for words in ("not differentiable", "not finite")), error
        assume(False)
    taped, exact = (np.array(numbers(result.document, method)) for method in METHODS[:2])
    assume(abs(exact).max() < 1e4)
    assert result.passed, f"{text}: {result.verdict}"
    # Tape and symbols differ only by rounding. The tolerance is for the differences.
    np.testing.assert_allclose(taped, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("text", "slope"),
    [
        ("exp(w)", math.exp(0.6)),
        ("log(w)", 1 / 0.6),
        ("sqrt(w)", 0.5 / math.sqrt(0.6)),
        ("tan(w)", 1 / math.cos(0.6) ** 2),
        ("asin(w)", 1 / math.sqrt(1 - 0.36)),
        ("acos(w)", -1 / math.sqrt(1 - 0.36)),
        ("sinh(w)", math.cosh(0.6)),
        ("cosh(w)", math.sinh(0.6)),
        ("abs(-w)", 1),
        ("relu(-w)", 0),
        ("sigmoid(w)", math.exp(-0.6) / (1 + math.exp(-0.6)) ** 2),
        ("softplus(w)", 1 / (1 + math.exp(-0.6))),
        ("minimum(w, 1) + maximum(3*w, 1)", 4),
        ("w**0.5", 0.5 / math.sqrt(0.6)),
        ("w**-2", -2 / 0.6**3),
        ("2**w", 2**0.6 * math.log(2)),
        ("-w**2", -1.2),
        ("e**(pi*w)", math.pi * math.exp(math.pi * 0.6)),
    ],
)
def test_every_function_has_the_slope_of_the_textbook(text: str, slope: float) -> None:
    assert derivatives(text, "w=0.6") == [pytest.approx(slope, rel=1e-12)]


def test_higher_orders_and_several_variables() -> None:
    assert derivatives("sin(2*w)", "w=0.3", order=3) == pytest.approx([-8 * math.cos(0.6)])
    assert derivatives("exp(2*w)", "w=0.5", order=4) == pytest.approx([16 * math.e])
    assert derivatives("w**2", "w=0", order=3) == [0]  # where 0 * inf lies in wait
    assert derivatives("a*w**2 + b*w", "a=1,b=2,w=3", "a,w") == [9, 8]
    assert derivatives("a*w", "a=1,w=3") == [3, 1]  # by all variables
    hessian = derive("a*w**2 + b*w", at="a=1,b=2,w=3", wrt="a,b,w", order=2)
    expected = {"d2/da2": 0, "d2/da db": 0, "d2/da dw": 6, "d2/db2": 0, "d2/db dw": 1, "d2/dw2": 2}
    for found in hessian.document["methods"].values():
        assert found == {"value": 15, **{name: pytest.approx(x) for name, x in expected.items()}}
    assert hessian.document["formulas"]["d2/da dw"] == "2*w"
    third = derivatives("x**3 * y**2", "x=2,y=3", order=3)  # xxx, xxy, xyy, yyy
    assert third == pytest.approx([54, 72, 24, 0])


@pytest.mark.parametrize(
    ("arguments", "slope"),
    [
        (["-log(p)", "--at", "p=0.5"], -2.0),
        (["--at", "p=0.5", "-p**2"], -1.0),
        (["--at=p=-1", "-p", "--order=1"], -1.0),
        (["--(p*p)", "--at", "p=3"], 6.0),
        (["--at", "p=3", "--", "--p"], 1.0),
        (["-.5*p", "--at", "p=3"], -0.5),
    ],
)
@pytest.mark.usefixtures("in_tmp_path")
def test_an_expression_may_begin_with_a_minus(
    command: Callable[..., Any], arguments: list[str], slope: float
) -> None:
    code, out, err = command("gradient", "--json", *arguments)
    assert code == 0, err
    assert numbers(json.loads(out)) == [slope]


def test_the_derivative_by_an_independent_variable_is_zero() -> None:
    assert derivatives("a**2", "a=3,b=1", "a,b") == [6, 0]
    assert derivatives("a*w", "a=2,w=1", "w", order=2) == [0]
    assert derivatives("a", "a=2,w=1", "w") == [0]


@pytest.mark.parametrize("text", ["sin(pi)", "0.1 + 0.2 - 0.3", "log(e) - 1 + 0*x"])
def test_rounding_of_constants_is_no_disagreement(text: str) -> None:
    assert derive(text, at="x=0,y=0", wrt="x,y").passed


@pytest.mark.parametrize(
    ("text", "at", "order", "said"),
    [
        ("abs(w)", "w=0", 1, "its derivative of order 1 is -1 on the left and 1 on the right"),
        ("3 + relu(w)", "w=0", 1, "its derivative of order 1 is 0 on the left and 1 on the right"),
        (
            "minimum(w, 1)",
            "w=1",
            1,
            "its derivative of order 1 is 1 on the left and 0 on the right",
        ),
        ("maximum(w, 2*w)", "w=0", 1, "not differentiable at w = 0"),
        ("abs(x) + abs(y)", "x=1,y=0", 1, "not differentiable at y = 0"),
        ("abs(w - 1e-10) + 1", "w=1e-10", 1, "not differentiable at w = 1e-10"),
        ("sqrt(w)", "w=0", 1, "its derivative of order 1 is nan on the left"),
        ("asin(w)", "w=1", 1, "nan on the right"),
        ("relu(w)**2", "w=0", 2, "its derivative of order 2 is 0 on the left and 2 on the right"),
        ("1 + log(w)", "w=-1", 1, "column 5: invalid value encountered in log"),
        ("1/w", "w=0", 1, "column 1: divide by zero encountered in scalar divide"),
        ("exp(w)", "w=1000", 1, "column 1: overflow encountered in exp"),
        ("(-w)**0.5", "w=2", 1, "column 1: invalid value encountered in scalar power"),
    ],
)
def test_bad_points_are_refused(text: str, at: str, order: int, said: str) -> None:
    with pytest.raises(InputError) as refused:
        derive(text, at=at, order=order)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("relu(w)**2", "w=0"),
        ("w*abs(w)", "w=0"),
        ("abs(w)", "w=1e-10"),
        ("sqrt(w)", "w=1e-10"),
        ("relu(w - 1e-4)", "w=0"),
        ("w**4 + cos(w)", "w=0"),
        ("w**4", "w=0"),
        ("sin(20*pi*w)", "w=0.1"),
        ("sin(w)", "w=1e6"),
    ],
)
def test_smooth_points_near_or_on_a_kink_are_accepted(text: str, at: str) -> None:
    assert derive(text, at=at).passed


@pytest.mark.parametrize(
    ("text", "at", "order", "exact"),
    [
        ("log(1-p)", "p=0.9999999", 1, -1 / (1 - 0.9999999)),
        ("log(1-p)", "p=0.9999999", 2, -1 / (1 - 0.9999999) ** 2),
        ("log(1-p)", "p=0.999999999999", 1, -1 / (1 - 0.999999999999)),
        ("sqrt(x)", "x=1e-12", 1, 0.5e6),
        ("1 + sqrt(x)", "x=1e-12", 1, 0.5e6),
        ("1/x", "x=1e-9", 1, -1e18),
        ("1/x", "x=1e-9", 4, 24e45),
        ("1/(1-x)", "x=0.99999", 1, 1 / (1 - 0.99999) ** 2),
        ("log(p)", "p=1e-300", 1, 1e300),
        ("w*log(w)", "w=1e-20", 1, math.log(1e-20) + 1),
        ("tan(x)", "x=1.57079632", 1, 1 / math.cos(1.57079632) ** 2),
        ("abs(1-w)", "w=0.9999999", 1, -1),
        ("sin(1/w)", "w=1e-6", 1, -math.cos(1e6) * 1e12),
        ("log(w + 1e-30)", "w=0", 1, 1e30),
        ("log(1-x-y)", "x=0.5,y=0.4999999", 1, [-1 / (0.5 - 0.4999999)] * 2),
        (
            "sqrt(x)*log(1-y)",
            "x=1e-10,y=0.99999999",
            1,
            [0.5e5 * math.log(1 - 0.99999999), -1e-5 / (1 - 0.99999999)],
        ),
    ],
)
def test_differences_are_correct_beside_a_singularity(
    text: str, at: str, order: int, exact: Any
) -> None:
    expression = parse(text, parse_values(at))
    found = methods.by_differences(expression, order)
    np.testing.assert_allclose(np.squeeze(found), exact, rtol=1e-9, atol=1e-9)
    assert derive(text, at=at, wrt=",".join(expression.at), order=order).passed


def test_points_are_printed_with_all_their_digits(
    command: Callable[..., Any], in_tmp_path: Path
) -> None:
    code, out, _ = command("gradient", "log(1-p)", "--at", "p=0.9999999999999")
    assert (code, out.splitlines()[0]) == (0, "log(1-p) at p=0.9999999999999")
    with pytest.raises(InputError, match=r"not differentiable at w = 0\.9999999999: its"):
        derive("abs(w - 0.9999999999)", at="w=0.9999999999")
    assert list(in_tmp_path.iterdir())


HOSTILE = [
    "__import__('os').system('touch pwned')",
    "w.__class__.__mro__",
    "(lambda: w)()",
    "[w for w in (1, 2)]",
    "w[0]",
    "f'{w}'",
    "'w'",
    "w if w else 1",
    "w and 1",
    "w < 1",
    "not w",
    "~w",
    "w // 2",
    "w % 2",
    "w << 9",
    "(w := 2)",
    "True",
    "1j * w",
    "exp(*w)",
    "exp(w, axis=0)",
    "w @ w",
    "exp(exp)",
    "(w, w)",
    "eval(w)",
    "load(w)",
    "add(w, w)",
    "w\x00",
    "9**9**9",
    "w*9**9**9",
    "(1/3)**9**9",
    "(3*w)**9**9",
    "(((3*w)**999)**999)**999",
    "(w*w)**5001",
    "1e999 * w",
    "9" * 400,
    "exp(" * 40 + "9" + ")" * 40,
    "(" * 10_000 + "w" + ")" * 10_000,
    "(" * 400 + "w" + ")" * 400,
    "sin(" * 190 + "w" + ")" * 190,
    "w" + "**w" * 240,
    "w" * 1_000_000,
    "*".join(f"sin(w+{i})" for i in range(90)),
    "",
    "   ",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:24]))
def test_hostile_text_is_refused_at_once(text: str, in_tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(InputError) as refused:
        derive(text, at="w=1.5", wrt="w", order=2 if "sin" in text else 1)
    assert "--at:" not in str(refused.value)  # the expression is wrong, not the values
    assert time.process_time() - start < 5  # a generous bound: the test is for hanging
    assert len(str(refused.value)) < 400
    assert not list(in_tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["w +* 2", "--at", "w=1"], "column 4: invalid syntax"),
        (["  (w + 2", "--at", "w=1"], "column 1: '(' was never closed"),
        (["2*w^2", "--at", "w=1"], "** (not ^), parentheses and functions; received '2 * w ^ 2'"),
        (
            ["1 + sine(w)", "--at", "w=1"],
            "received 'sine(w)'; did you mean 'sin'? available: abs, acos",
        ),
        (["rate*w", "--at", "rat=1,w=2"], "received 'rate'; did you mean 'rat'?"),
        (
            ["w"],
            "names with a value (--at), + - * / ** (not ^), parentheses and functions; received",
        ),
        (
            ["w", "--at", "w=1", "--wrt", "v"],
            "expected names with a value, each once, received v; available: w",
        ),
        (
            ["w", "--at", "w=1", "--wrt", "w,w"],
            "expected names with a value, each once, received w,w",
        ),
        (["sin(w, w)", "--at", "w=1"], "received 'sin(w, w)'"),
        (["sin*w", "--at", "w=1"], "received 'sin'"),
        (["w", "--at", "w"], "each NUMBER finite, received 'w'"),
        (
            ["w", "--at", "w=nan"],
            "expected NAME=NUMBER,..., each NAME once and no function or constant",
        ),
        (["w", "--at", "w=[1,2]"], "received 'w=[1,2]'"),
        (["w", "--at", "w=True"], "received 'w=True'"),
        (["w", "--at", "w=1j"], "received 'w=1j'"),
        (["w", "--at", "w=1e999"], "each NUMBER finite"),
        (["w", "--at", "w=1" + "0" * 400], "each NUMBER finite"),
        (["w", "--at", "w=" + "[" * 900], "expected NAME=NUMBER,..."),
        (["w", "--at", "w=" + "-" * 90_000 + "1"], "expected NAME=NUMBER,..."),
        (["w", "--at", "w=print(1)"], "received 'w=print(1)'"),
        (["w", "--at", "w=1,w=2"], "each NAME once"),
        (["w", "--at", "exp=1,w=1"], "no function or constant"),
        (["w", "--at", "lambda=1,w=1"], "received 'lambda=1,w=1'"),
        (["w", "--at", "w=1", "--order", "5"], "--order: expected 1 to 4, and at most 256"),
        (["-w", "--at", "v=1"], "expression, column 2: expected numbers"),
        (
            ["a+b+c+d+f+g+h", "--at", "a=1,b=1,c=1,d=1,f=1,g=1,h=1", "--order", "3"],
            "received 3 for 7 variables",
        ),
        (["w", "--model", "x.toml"], "--model uses the network's loss"),
        (["--model", "x.toml"], "x.toml"),
    ],
)
def test_a_mistake_is_one_line(
    command: Callable[..., Any], in_tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, out, err = command("gradient", *arguments)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 1), err
    assert said in lines[0]
    assert not list(in_tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["w", "--at", "w=1", "--wtr", "w"], ["-w", "--ta=w=1"]])
def test_an_unknown_option_is_refused(
    command: Callable[..., Any], in_tmp_path: Path, arguments: list[str]
) -> None:
    code, out, err = command("gradient", *arguments)
    assert (code, out) == (2, "")
    assert "Got unexpected extra argument" in err
    assert not list(in_tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.00001, math.nan])
@pytest.mark.parametrize("method", ["by_tape", "by_symbols", "by_differences"])
def test_a_wrong_method_is_found(
    method: str,
    factor: float,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    in_tmp_path: Path,
) -> None:
    """Each of the three methods in turn has a relative error of 1e-5, or is not finite."""
    right = getattr(methods, method)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if method == "by_differences":
            return [number * factor for number in found]
        value, derivatives, rest = found
        return value, [number * factor for number in derivatives], rest

    monkeypatch.setattr(methods, method, wrong)
    code, out, err = command("gradient")
    assert code == 4
    assert "DISAGREE" in err
    assert "central differences" in out  # the table is printed
    (run,) = (in_tmp_path / "runs").iterdir()
    document = json.loads((run / "gradient.json").read_text())
    assert not document["agree"]
    derivatives = [method["d/dw"] for method in document["methods"].values()]
    assert (derivatives.count(10), None in derivatives) == (2, math.isnan(factor))
