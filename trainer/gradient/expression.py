"""Parses an expression and the values of its names. No text is ever executed.

Python's `ast` parses the text. One function, `Expression.evaluate`, walks the tree for all methods
and accepts only numbers, names, and the operators and functions in `NUMPY`.
"""

import ast
import functools
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError, did_you_mean, expect

Array = NDArray[np.float64]
Operations = Mapping[str, Callable[..., Any]]

CONSTANTS = {"pi": np.float64(math.pi), "e": np.float64(math.e)}
# numpy, tf.math, sympy and mpmath have all these names.
ELEMENTARY = (
    *("exp", "log", "sqrt", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "sinh", "cosh", "tanh"),
)
# Most of Python's operators work with the numbers, arrays and formulas of every library.
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
NUMPY: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (*ELEMENTARY, "abs", "sum", "transpose")},
    **{name: getattr(np, name) for name in ("minimum", "maximum", "matmul")},
    "dot": np.matmul,
    "mean": lambda x: np.sum(x) / np.size(x),
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),  # cannot overflow
    "relu": lambda x: np.maximum(x, 0.0),
    "softplus": lambda x: np.logaddexp(0.0, x),
}
_ARITY = dict.fromkeys(NUMPY, 1) | dict.fromkeys(("minimum", "maximum", "dot", "matmul"), 2)
NUMPY |= OPERATORS | {"**": operator.pow, "@": np.matmul}
_SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_SYMBOLS |= {ast.MatMult: "@"}
_GRAMMAR = "numbers, names, + - * / ** @, parentheses and functions"

MAX_CHARACTERS = 1000
MAX_ELEMENTS = 64
MAX_EXPONENT = 1000  # sympy writes out (3*x)**n: it computes all digits of 3**n


@dataclass(frozen=True)
class Expression:
    """An expression and the point at which it is evaluated.

    Attributes:
        text: The text of the expression.
        tree: Its syntax tree.
        at: float64 arrays by name; shape (), (n,) or (rows, columns).
    """

    text: str
    tree: ast.expr
    at: dict[str, Array]

    @functools.cached_property
    def value(self) -> Array:
        """The value at the point, float64."""
        with np.errstate(all="raise", under="ignore"):
            value = self.evaluate(NUMPY | {"**": _power}, {**self.at, **CONSTANTS}, np.float64)
        return np.asarray(value)

    @property
    def names(self) -> list[str]:
        """The names of its variables."""
        nodes = ast.walk(self.tree)
        return sorted({node.id for node in nodes if isinstance(node, ast.Name)} & self.at.keys())

    def labels(self, wrt: Sequence[str]) -> list[str]:
        """Returns a name for each element of some variables: "w", or "A[0,1]"."""
        return [
            f"{name}[{','.join(map(str, index))}]" if index else name
            for name in wrt
            for index in np.ndindex(*self.at[name].shape)
        ]

    def point(self, wrt: Sequence[str]) -> Array:
        """Returns the elements of some variables, one variable after the other, float64 [n]."""
        return np.concatenate([self.at[name].ravel() for name in wrt])

    def split(self, wrt: Sequence[str], point: Any, reshape: Callable[..., Any]) -> dict[str, Any]:
        """Returns all variables by name, with those of `wrt` replaced by the elements of a point.

        Args:
            wrt: Names of variables.
            point: An array of any library, [n].
            reshape: Its function of an array and a shape.
        """
        values: dict[str, Any] = {**self.at}
        start = 0
        for name in wrt:
            end = start + self.at[name].size
            values[name] = reshape(point[start:end], self.at[name].shape)
            start = end
        return values

    def evaluate(
        self, operations: Operations, values: Mapping[str, Any], number: Callable[[Any], Any]
    ) -> Any:
        """Evaluates the expression with the functions of a library.

        Args:
            operations: Functions by the names in `NUMPY`.
            values: Values of variables and constants.
            number: Converts a number of the text to a value.

        Raises:
            InputError: A part of the expression is not allowed, not finite or too large.
        """

        def visit(node: ast.expr) -> Any:
            try:
                match node:
                    case ast.Constant(value=(int() | float()) as constant) if (
                        not isinstance(constant, bool) and constant <= sys.float_info.max
                    ):
                        return number(constant)
                    case ast.Name(id=name) if name in values:
                        return values[name]
                    case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                        return visit(operand)
                    case ast.UnaryOp(op=ast.USub(), operand=operand):
                        name, operands = "*", [ast.Constant(-1), operand]
                    case ast.BinOp(left=left, op=op, right=right) if type(op) in _SYMBOLS:
                        name, operands = _SYMBOLS[type(op)], [left, right]
                    case ast.Call(func=ast.Name(id=name), args=operands, keywords=[]) if _ARITY.get(
                        name
                    ) == len(operands):
                        pass
                    case _:
                        raise ValueError(_explain(node, values))
                return operations[name](*map(visit, operands))
            except (ValueError, FloatingPointError) as error:
                column = node.col_offset + 1
                raise InputError(f"expression, column {column}: {error}") from None

        return visit(self.tree)


def element_operations(library: Any, sign: Callable[[Any], Any]) -> Operations:
    """Returns operations on numpy arrays of a library's own numbers or formulas.

    Args:
        library: A module with the functions in `ELEMENTARY` for one element.
        sign: Its sign function.
    """

    def relu(x: Any) -> Any:
        return x * (1 + sign(x)) / 2

    elements: Operations = {
        **{name: getattr(library, name) for name in ELEMENTARY},
        "abs": lambda x: x * sign(x),
        "sigmoid": lambda x: 1 / (1 + library.exp(-x)),
        "relu": relu,
        "softplus": lambda x: library.log(1 + library.exp(x)),
        "minimum": lambda x, y: x - relu(x - y),
        "maximum": lambda x, y: y + relu(x - y),
    }
    return NUMPY | {name: np.vectorize(call, otypes=[object]) for name, call in elements.items()}


def _power(base: Any, exponent: Any) -> Any:
    if np.max(abs(exponent)) > MAX_EXPONENT:
        raise ValueError(f"expected exponents of at most {MAX_EXPONENT:,}")
    return base**exponent


def _explain(node: ast.expr, values: Mapping[str, Any]) -> str:
    match node:
        case ast.Name(id=name):
            known = did_you_mean(name, values)
            return f"{name[:40]!r} has no value: expected --at {name[:40]}=...; {known}"
        case ast.Call(func=ast.Name(id=name), args=operands) if name in _ARITY:
            return f"{name} takes {_ARITY[name]} argument(s), received {len(operands)}"
        case ast.Call(func=ast.Name(id=name)):
            return f"unknown function {name[:40]!r}: {did_you_mean(name, _ARITY, shown=30)}"
        case ast.BinOp(op=ast.BitXor()):
            return "^ is not a power here: write **"
    return f"expected {_GRAMMAR}; received a Python {type(node).__name__}"


def parse(text: str, at: dict[str, Array]) -> Expression:
    """Parses an expression and checks it at a point.

    Args:
        text: At most 1,000 characters, such as "a*w**2 + sum(x)".
        at: A value for every name.

    Raises:
        InputError: The text is not an expression of this language, a name has no value, shapes do
            not fit, or a part of the expression is not finite at the point.
    """
    expect(len(text) <= MAX_CHARACTERS, "expression", f"{MAX_CHARACTERS:,} characters", len(text))
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column, reason = getattr(error, "offset", None) or 1, getattr(error, "msg", error)
        raise InputError(f"expression, column {column}: {reason} (expected {_GRAMMAR})") from None
    expression = Expression(text.strip(), tree, at)
    expression.value  # noqa: B018 - raises the errors above
    return expression


def parse_values(text: str) -> dict[str, Array]:
    """Parses "a=1,x=[1,2],A=[[1,2],[3,4]]" to float64 arrays by name.

    Raises:
        InputError: The text has another form, or there are more than 64 elements.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("a value without a name")
        values = {str(k.arg): np.array(ast.literal_eval(k.value)) for k in call.keywords}
        for name, array in values.items():
            if not (name.isascii() and name[0].isalpha()) or name in NUMPY | CONSTANTS:
                raise ValueError(f"{name} is not a name, or a function or a constant")
            if array.dtype.kind not in "iuf" or not array.size or not np.isfinite(array).all():
                raise ValueError(f"{name} is not a finite number")
        elements = sum(array.size for array in values.values())
        if elements > MAX_ELEMENTS or any(array.ndim > 2 for array in values.values()):
            raise ValueError(f"{elements} elements, or 3 dimensions: at most {MAX_ELEMENTS} and 2")
        if len(values) < len(call.keywords):
            raise ValueError("a name is repeated")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            "--at: expected NAME=VALUE,... where VALUE is a finite number, [1,2,...] or "
            f"[[1,2],[3,4]]; received {text[:40]!r} ({getattr(error, 'msg', error)})"
        ) from None
    return {name: array.astype(np.float64) for name, array in values.items()}
