"""Parses an expression and the values of its names. No text is ever executed.

Python's `ast` parses the text. One function, `Expression.evaluate`, walks the tree for all methods
and accepts only numbers, names, and the operators and functions in `NUMPY`.
"""

import ast
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import InputError, did_you_mean, expect

CONSTANTS = {"pi": np.float64(math.pi), "e": np.float64(math.e)}
# numpy, tf.math, sympy and mpmath have all these names.
ELEMENTARY = (
    *("exp", "log", "sqrt", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "sinh", "cosh", "tanh"),
)
# Python's operators work with the numbers and formulas of every library.
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
NUMPY: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (*ELEMENTARY, "abs", "minimum", "maximum")},
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),  # cannot overflow
    "relu": lambda x: np.maximum(x, 0.0),
    "softplus": lambda x: np.logaddexp(0.0, x),
}
_ARITY = dict.fromkeys(NUMPY, 1) | {"minimum": 2, "maximum": 2}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_GRAMMAR = "numbers, names with a value (--at), + - * / ** (not ^), parentheses and functions"

MAX_CHARACTERS = 1000
MAX_EXPONENT = 1000  # sympy writes out (3*x)**n: it computes all digits of 3**n


class Library(NamedTuple):
    """A library that evaluates expressions."""

    operations: Mapping[str, Callable[..., Any]]  # by the names in `NUMPY` and `OPERATORS`, and **
    constants: Mapping[str, Any]  # "pi" and "e"
    number: Callable[[Any], Any]  # converts a number of the text


@dataclass(frozen=True)
class Expression:
    """An expression, the point at which it is evaluated, and the variables to differentiate by."""

    text: str
    tree: ast.expr
    at: dict[str, float]
    wrt: list[str]  # names of the variables to differentiate by
    value: float  # at the point

    def derivatives(self, order: int) -> list[tuple[str, ...]]:
        """Returns the variables of each derivative of an order. Mixed derivatives occur once."""
        return list(itertools.combinations_with_replacement(self.wrt, order))

    def evaluate(self, values: Mapping[str, Any], library: Library) -> Any:
        """Evaluates the expression with numbers or formulas of the library by name."""
        return _evaluate(self.tree, {**library.constants, **values}, library)


def composed_operations(library: Any, sign: Callable[[Any], Any]) -> dict[str, Callable[..., Any]]:
    """Returns the operations of a library that has only those in `ELEMENTARY`.

    Args:
        library: A module with these functions.
        sign: Its sign function.
    """

    def relu(x: Any) -> Any:
        return x * (1 + sign(x)) / 2

    return {
        **OPERATORS,
        **{name: getattr(library, name) for name in ELEMENTARY},
        "**": operator.pow,
        "abs": lambda x: x * sign(x),
        "sigmoid": lambda x: 1 / (1 + library.exp(-x)),
        "relu": relu,
        "softplus": lambda x: library.log(1 + library.exp(x)),
        "minimum": lambda x, y: x - relu(x - y),
        "maximum": lambda x, y: y + relu(x - y),
    }


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"expected exponents of at most {MAX_EXPONENT:,}")
    return base**exponent


def _evaluate(node: ast.expr, values: Mapping[str, Any], library: Library) -> Any:
    """Evaluates a syntax tree. An InputError names the column of a part that is not allowed."""
    try:
        match node:
            case ast.Constant(int() | float() as x) if not isinstance(x, bool) and x < 1e308:
                return library.number(x)
            case ast.Name(name) if name in values:
                return values[name]
            case ast.UnaryOp(ast.UAdd(), operand):
                return _evaluate(operand, values, library)
            case ast.UnaryOp(ast.USub(), operand):
                name, operands = "*", [ast.Constant(-1), operand]
            case ast.BinOp(left, sign, right) if type(sign) in _SIGNS:
                name, operands = _SIGNS[type(sign)], [left, right]
            case ast.Call(ast.Name(name), operands, []) if _ARITY.get(name) == len(operands):
                pass
            case _:
                received = ast.unparse(node)[:40]
                known = did_you_mean(received.partition("(")[0], {*values, *_ARITY}, shown=40)
                raise ValueError(f"expected {_GRAMMAR}; received {received!r}; {known}")
        arguments = [_evaluate(operand, values, library) for operand in operands]
        return library.operations[name](*arguments)
    except (ValueError, FloatingPointError) as error:
        raise InputError(f"expression, column {node.col_offset + 1}: {error}") from None


def parse(text: str, at: dict[str, float], wrt: str | None = None) -> Expression:
    """Parses an expression and checks it at a point.

    Args:
        text: At most 1,000 characters, such as "a*w**2 + sin(x)".
        at: A value for every name.
        wrt: The variables to differentiate by, separated by commas; None: all of the expression.

    Raises:
        InputError: The text is not an expression of this language, a name has no value, or a part
            of the expression is not finite at the point.
    """
    expect(len(text) <= MAX_CHARACTERS, "expression", f"{MAX_CHARACTERS:,} characters", len(text))
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column, reason = getattr(error, "offset", None) or 1, getattr(error, "msg", error)
        raise InputError(f"expression, column {column}: {reason} (expected {_GRAMMAR})") from None
    with np.errstate(all="raise", under="ignore"):
        checked = Library(NUMPY | OPERATORS | {"**": _power}, CONSTANTS, np.float64)
        values = {name: np.float64(number) for name, number in at.items()}
        value = float(_evaluate(tree, CONSTANTS | values, checked))
    used = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & at.keys())
    names = used if wrt is None else [name.strip() for name in wrt.split(",")]
    known = names and all(name in at and names.count(name) == 1 for name in names)
    received = f"{wrt}; {did_you_mean(wrt or '', at)}"
    expect(known, "--wrt", "names with a value, each once", received)
    at = {name: value for name, value in at.items() if name in {*used, *names}}
    return Expression(text.strip(), tree, at, names, value)


def parse_values(text: str) -> dict[str, float]:
    """Parses "a=1,b=-0.5" to numbers by name.

    Raises:
        InputError: The text has another form.
    """
    try:
        call: Any = ast.parse(f"f({text})", mode="eval").body
        values = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        fits = not call.args and len(values) == len(call.keywords)
        fits = fits and all(itertools.starmap(_is_variable, values.items()))
    except (AttributeError, SyntaxError, ValueError, RecursionError, MemoryError):
        values, fits = {}, False
    form = "NAME=NUMBER,..., each NAME once and no function or constant, each NUMBER finite"
    expect(fits, "--at", form, repr(text[:40]))
    return {name: float(number) for name, number in values.items()}


def _is_variable(name: str, value: Any) -> bool:
    """Returns whether a name and its value can be used in an expression."""
    is_new = name.isascii() and name[0].isalpha() and name not in _ARITY | CONSTANTS
    return is_new and type(value) in (int, float) and abs(value) < 1e308
