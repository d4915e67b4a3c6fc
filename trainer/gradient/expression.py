"""Parses an expression and the values of its names. No text is ever executed.

Python's `ast` parses the text. One function, `Expression.evaluate`, walks the tree for all methods
and accepts only numbers, names, operators and the functions in `NUMPY`.
"""

import ast
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError, did_you_mean

Array = NDArray[np.float64]
Operations = Mapping[str, Callable[..., Any]]

CONSTANTS = {"pi": np.float64(math.pi), "e": np.float64(math.e)}
# numpy and tf.math have all these names; sympy has those of the functions.
ARITHMETIC = ("add", "subtract", "multiply", "divide", "pow", "negative")
FUNCTIONS = (
    *("exp", "log", "sqrt", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "sinh", "cosh", "tanh"),
)
NUMPY: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (*ARITHMETIC, *FUNCTIONS, "abs", "sum", "mean")},
    **{name: getattr(np, name) for name in ("minimum", "maximum", "matmul", "transpose")},
    "dot": np.matmul,
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),  # cannot overflow
    "relu": lambda x: np.maximum(x, 0.0),
    "softplus": lambda x: np.logaddexp(0.0, x),
}
_CALLABLE = NUMPY.keys() - set(ARITHMETIC)
_OPERATORS = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_OPERATORS |= {ast.Pow: "pow", ast.MatMult: "matmul"}
_GRAMMAR = "numbers, names, + - * / ** @, parentheses and functions"

MAX_CHARACTERS = 1000
MAX_ELEMENTS = 64
MAX_DEPTH = 300  # a sum of n terms has depth n; Python's recursion limit is 1,000
# On single elements, with w**n as n products. sympy needs seconds for this many, and it writes out
# (3*x)**n: a larger n would need gigabytes for the digits of 3**n.
MAX_OPERATIONS = 5000


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
    at: Mapping[str, Array]

    @functools.cached_property
    def root(self) -> "_Part":
        """The checked expression."""
        operations = {name: functools.partial(_check, name) for name in NUMPY}
        variables = {name: _Part(value, 1, constant=False) for name, value in self.at.items()}
        constants = {name: _number(value) for name, value in CONSTANTS.items()}
        with np.errstate(all="raise", under="ignore"):
            part: _Part = self.evaluate(operations, variables | constants, _number)
        return part

    @property
    def value(self) -> Array:
        """The value at the point, float64."""
        return self.root.value

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

        def visit(tree: ast.expr, depth: int) -> Any:
            if depth > MAX_DEPTH:
                raise InputError("the expression is nested too deeply")
            try:
                match tree:
                    case ast.Constant(value=(int() | float()) as constant):
                        return number(constant)
                    case ast.Name(id=name) if name in values:
                        return values[name]
                    case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                        return visit(operand, depth + 1)
                    case ast.UnaryOp(op=ast.USub(), operand=operand):
                        name, operands = "negative", [operand]
                    case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                        name, operands = _OPERATORS[type(op)], [left, right]
                    case ast.Call(func=ast.Name(id=name), args=operands, keywords=[]) if (
                        name in _CALLABLE
                    ):
                        pass
                    case _:
                        raise ValueError(_explain(tree, values))
                return operations[name](*(visit(operand, depth + 1) for operand in operands))
            except (ValueError, FloatingPointError) as error:
                column = tree.col_offset + 1
                raise InputError(f"expression, column {column}: {error}") from None

        return visit(self.tree, 0)


def element_operations(library: Any, sign: Callable[[Any], Any]) -> Operations:
    """Returns operations on numpy arrays of a library's own numbers or formulas.

    Args:
        library: A module with the functions in `FUNCTIONS` for one element.
        sign: Its sign function.
    """

    def relu(x: Any) -> Any:
        return x * (1 + sign(x)) / 2

    elements: Operations = {
        **{name: getattr(library, name) for name in FUNCTIONS},
        "abs": lambda x: x * sign(x),
        "sigmoid": lambda x: 1 / (1 + library.exp(-x)),
        "relu": relu,
        "softplus": lambda x: library.log(1 + library.exp(x)),
        "minimum": lambda x, y: x - relu(x - y),
        "maximum": lambda x, y: y + relu(x - y),
    }
    return NUMPY | {name: np.vectorize(call, otypes=[object]) for name, call in elements.items()}


class _Part(NamedTuple):
    """A checked part of an expression."""

    value: Array
    operations: float  # on single elements, for one element of the value
    constant: bool  # contains no variable


def _number(value: float) -> _Part:
    if not math.isfinite(float(str(value))):  # str: an integer can be too large for float()
        raise ValueError("the number is too large for float64")
    return _Part(np.asarray(value, np.float64), 1, constant=True)


def _check(name: str, *operands: _Part) -> _Part:
    """Applies an operation, if numpy accepts the operands and the result is not too large."""
    arity = 2 if name in ("minimum", "maximum", "dot", "matmul", *ARITHMETIC[:-1]) else 1
    if len(operands) != arity:
        raise ValueError(f"{name} takes {arity} argument(s), received {len(operands)}")
    values = [operand.value for operand in operands]
    value = np.asarray(NUMPY[name](*values), np.float64)
    operations = 1 + sum(operand.operations for operand in operands)
    if name in ("sum", "mean"):
        operations *= values[0].size
    elif name in ("dot", "matmul"):
        operations *= values[0].shape[-1]
    elif name == "pow" and operands[1].constant:
        operations *= max(1.0, abs(float(values[1])))
    if operations * value.size > MAX_OPERATIONS:
        raise ValueError(
            f"expected at most {MAX_OPERATIONS:,} operations on single numbers (w**n counts as n), "
            f"received {operations * value.size:,.0f}"
        )
    return _Part(value, operations, all(operand.constant for operand in operands))


def _explain(tree: ast.expr, values: Mapping[str, Any]) -> str:
    match tree:
        case ast.Name(id=name) if name in _CALLABLE:
            return f"{name} is a function: expected {name}(...)"
        case ast.Name(id=name):
            known = did_you_mean(name, values)
            return f"{name[:40]!r} has no value: expected --at {name[:40]}=...; {known}"
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return f"unknown function {name[:40]!r}: {did_you_mean(name, _CALLABLE, shown=30)}"
        case ast.BinOp(op=ast.BitXor()):
            return "^ is not a power here: write **"
    return f"expected {_GRAMMAR}; received a Python {type(tree).__name__}"


def parse(text: str, at: Mapping[str, Array]) -> Expression:
    """Parses an expression and checks it at a point.

    Args:
        text: At most 1,000 characters, such as "a*w**2 + sum(x)".
        at: A value for every name.

    Raises:
        InputError: The text is not an expression of this language, a name has no value, shapes do
            not fit, or a part of the expression is not finite at the point.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"expected at most {MAX_CHARACTERS:,} characters, received {len(text):,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about "1if x", which is refused below
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column, reason = getattr(error, "offset", None) or 1, getattr(error, "msg", error)
        raise InputError(f"expression, column {column}: {reason} (expected {_GRAMMAR})") from None
    expression = Expression(text.strip(), tree, at)
    expression.root  # noqa: B018 - raises the errors above
    return expression


def parse_values(text: str) -> dict[str, Array]:
    """Parses "a=1,x=[1,2],A=[[1,2],[3,4]]" to float64 arrays by name.

    Raises:
        InputError: The text has another form, or there are more than 64 elements.
    """
    values: dict[str, Array] = {}
    try:
        tree = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            raise ValueError("a value without a name")
        for keyword in tree.keywords:
            name, array = keyword.arg or "**", np.array(ast.literal_eval(keyword.value))
            taken = {*values, *_CALLABLE, *CONSTANTS}
            if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or name in taken:
                raise ValueError(f"{name} is repeated, not a name, a function or a constant")
            if array.dtype.kind not in "iuf" or not array.size or not np.isfinite(array).all():
                raise ValueError(f"{name} is not a finite number")
            values[name] = array.astype(np.float64)
        elements = sum(array.size for array in values.values())
        if elements > MAX_ELEMENTS or any(array.ndim > 2 for array in values.values()):
            raise ValueError(f"{elements} elements, or 3 dimensions: at most {MAX_ELEMENTS} and 2")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            "--at: expected NAME=VALUE,... where VALUE is a finite number, [1,2,...] or "
            f"[[1,2],[3,4]]; received {text[:40]!r} ({getattr(error, 'msg', error)})"
        ) from None
    return values
