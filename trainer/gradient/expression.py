"""Reads an expression and the values of its names; nothing of it is ever run as Python.

Python's own `ast` takes the text apart. What comes out is walked, and whatever is not a number, a
name, an operator or a function listed here is refused with its place.
"""

import ast
import json
import keyword
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError, did_you_mean

Shape = tuple[int, ...]
Values = dict[str, NDArray[np.float64]]

CONSTANTS = {"pi": math.pi, "e": math.e}
ELEMENTWISE = (
    *("exp", "log", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("abs", "sigmoid", "relu", "softplus"),
)
PAIRWISE = ("minimum", "maximum")
REDUCTIONS = ("sum", "mean")
_ARGUMENTS = (
    dict.fromkeys((*ELEMENTWISE, *REDUCTIONS, "transpose"), 1)
    | dict.fromkeys((*PAIRWISE, "dot", "matmul"), 2)
)  # fmt: skip
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.Pow: "power",
    ast.MatMult: "matmul",
}
_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "negative": np.negative,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "abs": np.abs,
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),  # without an overflow on either side
    "relu": lambda x: np.maximum(x, 0.0),
    "softplus": lambda x: np.logaddexp(0.0, x),
    "minimum": np.minimum,
    "maximum": np.maximum,
    "sum": np.sum,
    "mean": np.mean,
    "dot": np.dot,
    "matmul": np.dot,  # for at most two dimensions the same
    "transpose": np.transpose,
}
_GRAMMAR = "numbers, names, + - * / ** @, parentheses and functions"

# By how many units in the last place results are changed to see what rounding does, and how often.
_CHANGED_BITS, _CHANGES = 16, 8

MOST_CHARACTERS = 1000
MOST_NESTED = 50
MOST_ELEMENTS = 64
# sympy multiplies out (3*x)**n: larger powers would fill the memory with digits.
MOST_DEGREE = 1000
# Scalar operations in all elements together: what sympy gets through in seconds.
MOST_OPERATIONS = 5000


@dataclass(frozen=True)
class Node:
    """A part of an expression.

    Attributes:
        operation: "number", "name", or what is done with the arguments ("add", "exp", ...).
        arguments: The parts that it works on.
        column: Where it begins in the text, from 1.
        shape: Of its value: (), (n,) or (rows, columns).
        degree: The power of a name in it at the most.
        operations: Scalar operations for one element, with nothing shared.
        name: Of a variable or a constant.
        number: The value, where no variable is in it.
    """

    operation: str
    arguments: tuple["Node", ...]
    column: int
    shape: Shape
    degree: float = 1
    operations: int = 1
    name: str = ""
    number: int | float | None = None

    @property
    def size(self) -> int:
        """The number of elements of its value."""
        return math.prod(self.shape)

    def names(self) -> set[str]:
        """Returns the variables in it."""
        own = {self.name} if self.operation == "name" and self.number is None else set()
        return own.union(*(argument.names() for argument in self.arguments))


@dataclass(frozen=True)
class Expression:
    """An expression, and the point it is looked at.

    Attributes:
        text: As it was written.
        root: Its tree.
        at: float64 arrays by name; shape (), (n,) or (rows, columns).
    """

    text: str
    root: Node
    at: Values


def parse(text: str, at: Values) -> Expression:
    """Reads an expression.

    Args:
        text: At most 1,000 characters, such as "a*w**2 + sum(x)".
        at: A value for every name; the shapes decide what fits together.

    Raises:
        InputError: It is no expression of this language, a name has no value, or shapes do not fit.
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(
            f"the expression has {len(text):,} characters: expected at most {MOST_CHARACTERS:,}"
        )
    text = re.sub(r"\s", " ", text)
    if not text.strip():
        raise InputError("the expression is empty: expected one such as 'a*w**2 + b*w + c'")
    if strange := re.search(r"[^A-Za-z0-9_.+\-*/^@(), ]", text):
        raise _mistake(strange.start() + 1, f"expected {_GRAMMAR}; received {strange[0]!r}")
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MOST_NESTED:
        raise InputError(f"parentheses {deepest} deep: expected at most {MOST_NESTED}")
    root = _Builder(at).build(_python_tree(text), 0)
    if root.operations * root.size > MOST_OPERATIONS:
        raise InputError(
            f"the expression has {root.operations * root.size:,} operations on single numbers: "
            f"expected at most {MOST_OPERATIONS:,}"
        )
    return Expression(text.strip(), root, at)


def parse_values(text: str) -> Values:
    """Reads "a=1,x=[1,2],A=[[1,2],[3,4]]" as float64 arrays by name.

    Raises:
        InputError: It is written otherwise, or there are more than 64 elements.
    """
    if len(text) > 10 * MOST_CHARACTERS:
        raise InputError(
            f"--at has {len(text):,} characters: expected at most {10 * MOST_CHARACTERS:,}"
        )
    values: Values = {}
    for part in _split(text):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise InputError(f"--at: expected name=value, received {part.strip()[:40]!r}")
        if name in _ARGUMENTS or name in CONSTANTS or keyword.iskeyword(name):
            kind = "function" if name in _ARGUMENTS else "constant" if name in CONSTANTS else "word"
            raise InputError(f"--at: {name} is a {kind} of the language: choose another name")
        if name in values:
            raise InputError(f"--at gives {name} twice")
        values[name] = _value(name, value)
    elements = sum(array.size for array in values.values())
    if elements > MOST_ELEMENTS:
        raise InputError(f"--at gives {elements} elements: expected at most {MOST_ELEMENTS}")
    return values


def evaluate(expression: Expression, values: Values) -> NDArray[np.float64]:
    """Returns the value at a point, float64; not finite where the expression is not defined."""

    def walk(node: Node) -> Any:
        if node.number is not None:
            return np.float64(node.number)
        if node.operation == "name":
            return values[node.name]
        return _NUMPY[node.operation](*map(walk, node.arguments))

    with np.errstate(all="ignore"):
        return np.asarray(walk(expression.root), dtype=np.float64)


def largest_part(expression: Expression) -> float:
    """Returns the largest magnitude of any part at the point: rounding is measured by it.

    Raises:
        InputError: A part is not finite there; the innermost one is named.
    """
    largest = 0.0

    def walk(node: Node) -> NDArray[np.float64]:
        nonlocal largest
        if not node.arguments:
            leaf = expression.at[node.name] if node.number is None else node.number
            largest = max(largest, float(np.abs(leaf).max()))
            return np.asarray(leaf, dtype=np.float64)
        arguments = [walk(argument) for argument in node.arguments]
        value = np.asarray(_NUMPY[node.operation](*arguments), dtype=np.float64)
        if not np.isfinite(value).all():
            raise InputError(
                f"expression, column {node.column}: {_describe(node, list(arguments))} is not "
                f"finite ({value[~np.isfinite(value)][0]}): choose another point"
            )
        largest = max(largest, float(abs(value).max()))
        return value

    with np.errstate(all="ignore"):
        value = walk(expression.root)
    return max(largest, float(abs(value).max()))


def rounding_noise(expression: Expression) -> NDArray[np.float64]:
    """Estimates by how much rounding changes the value at the point, float64 of its shape.

    The last bits of the result of every operation are changed at random, some times over, as in
    stochastic arithmetic (Vignes, A stochastic arithmetic for reliable scientific computation,
    Mathematics and Computers in Simulation 35, 1993). Numbers that are written in the expression
    are the same in every evaluation.
    """
    random = np.random.RandomState(0)
    epsilon = float(np.finfo(np.float64).eps)

    def walk(node: Node) -> Any:
        if node.number is not None:
            return np.float64(node.number)
        if node.operation == "name":
            return expression.at[node.name]
        value = _NUMPY[node.operation](*map(walk, node.arguments))
        return value * (1 + _CHANGED_BITS * epsilon * random.choice([-1, 1], node.shape))

    with np.errstate(all="ignore"):
        value = evaluate(expression, expression.at)
        changes = [abs(walk(expression.root) - value) / _CHANGED_BITS for _ in range(_CHANGES)]
        return np.asarray(np.fmax.reduce([epsilon * abs(value), *changes]), dtype=np.float64)


def _python_tree(text: str) -> ast.expr:
    stripped = text.lstrip()  # Python takes spaces in front for an indented block
    moved = len(text) - len(stripped)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python finds odd in "1if x" is refused below
            tree = ast.parse(stripped, mode="eval").body
    except SyntaxError as error:
        column = max(1, error.offset or 1) + moved
        raise _mistake(column, f"{error.msg} (expected {_GRAMMAR})") from None
    except (RecursionError, MemoryError):
        raise InputError("the expression is nested too deeply") from None
    for node in ast.walk(tree):
        if hasattr(node, "col_offset"):
            node.col_offset += moved
    return tree


class _Builder:
    """Turns what `ast` found into nodes, and refuses what is not of the language."""

    def __init__(self, at: Values) -> None:
        """Takes the values, for their shapes."""
        self._at = at

    def build(self, tree: ast.expr, depth: int) -> Node:
        """Returns the node of one part."""
        column = tree.col_offset + 1
        # A sum of many terms is as deep as it is long; Python's own limit is 1,000.
        if depth > 300:
            raise InputError("the expression is nested too deeply")
        match tree:
            case ast.Constant(value=(int() | float()) as number) if not isinstance(number, bool):
                return _number(number, column)
            case ast.Name(id=name):
                return self._name(name, column)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.build(operand, depth + 1)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _node("negative", (self.build(operand, depth + 1),), column)
            case ast.BinOp(left=left, op=ast.BitXor()):
                raise _mistake((left.end_col_offset or 0) + 1, "^ is no power here: write **")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                pair = (self.build(left, depth + 1), self.build(right, depth + 1))
                return _node(_OPERATORS[type(op)], pair, column)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments, column, depth)
        raise _mistake(column, f"expected {_GRAMMAR}; received a Python {type(tree).__name__}")

    def _name(self, name: str, column: int) -> Node:
        if name in CONSTANTS:
            return Node("name", (), column, (), 0, name=name, number=CONSTANTS[name])
        if name in self._at:
            return Node("name", (), column, self._at[name].shape, name=name)
        if name in _ARGUMENTS:
            raise _mistake(column, f"{name} is a function: expected {name}(...)")
        known = did_you_mean(name, [*self._at, *CONSTANTS])
        raise _mistake(column, f"the name {name!r} has no value: expected --at {name}=...; {known}")

    def _call(self, name: str, arguments: list[ast.expr], column: int, depth: int) -> Node:
        if name not in _ARGUMENTS:
            raise _mistake(
                column, f"unknown function {name!r}: {did_you_mean(name, _ARGUMENTS, shown=30)}"
            )
        if len(arguments) != _ARGUMENTS[name]:
            raise _mistake(
                column, f"{name} takes {_ARGUMENTS[name]} argument(s), received {len(arguments)}"
            )
        return _node(name, tuple(self.build(part, depth + 1) for part in arguments), column)


def _number(value: int | float, column: int) -> Node:
    try:
        finite = math.isfinite(float(value))
    except OverflowError:
        finite = False
    if not finite:
        raise _mistake(column, "the number is larger than float64 holds")
    return Node("number", (), column, (), 0, number=value)


def _node(operation: str, arguments: tuple[Node, ...], column: int) -> Node:
    """Puts parts together, if their shapes fit and the result can be handled."""
    shape = _shape(operation, arguments, column)
    inner = 1
    if operation in REDUCTIONS:
        inner = max(1, arguments[0].size)
    elif operation in ("dot", "matmul"):
        inner = arguments[0].shape[-1]
    operations = inner * (1 + sum(argument.operations for argument in arguments))
    degree = max(argument.degree for argument in arguments)
    if operation in ("multiply", "divide", "dot", "matmul"):
        degree = sum(argument.degree for argument in arguments)
    number = _constant(operation, arguments, column)
    if operation == "power" and arguments[1].number is not None:
        degree = arguments[0].degree * max(1, abs(arguments[1].number))
    if degree > MOST_DEGREE and number is None:
        raise _mistake(
            column, f"expected powers of at most {MOST_DEGREE:,}, received {degree:,.0f}"
        )
    return Node(operation, arguments, column, shape, degree, operations, number=number)


def _constant(operation: str, arguments: tuple[Node, ...], column: int) -> float | None:
    """Returns the value of what has no variable in it, so that none is too large to be exact."""
    numbers = [argument.number for argument in arguments]
    if any(number is None for number in numbers):
        return None
    with np.errstate(all="ignore"):
        value = float(_NUMPY[operation](*(np.float64(number) for number in numbers)))
    vanished = operation == "power" and value == 0 and numbers[0] != 0
    if not math.isfinite(value) or vanished:
        what = "is too small for float64" if vanished else f"is not finite ({value})"
        raise _mistake(column, f"{_words(operation, [f'{number:g}' for number in numbers])} {what}")
    return value


def _shape(operation: str, arguments: tuple[Node, ...], column: int) -> Shape:
    shapes = [argument.shape for argument in arguments]
    if operation in REDUCTIONS:
        return ()
    if operation == "transpose":
        return shapes[0][::-1]
    if operation in ("dot", "matmul"):
        left, right = shapes
        most = 1 if operation == "dot" else 2
        if not (1 <= len(left) <= most and 1 <= len(right) <= most and left[-1] == right[0]):
            expected = "two vectors of one length" if most == 1 else "[.., n] and [n, ..]"
            raise _mistake(
                column, f"{operation}: expected {expected}, received {list(left)}, {list(right)}"
            )
        return left[:-1] + right[1:]
    tensors = {shape for shape in shapes if shape}
    if len(tensors) > 1:
        received = " and ".join(str(list(shape)) for shape in shapes)
        raise _mistake(
            column, f"{operation}: expected equal shapes or a scalar, received {received}"
        )
    return next(iter(tensors), ())


def _words(operation: str, arguments: list[str]) -> str:
    """Writes an operation as a person would."""
    sign = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "power": "**"}
    if operation == "negative":
        return f"-{arguments[0]}"
    if operation in sign:
        return f"{arguments[0]} {sign[operation]} {arguments[1]}"
    return f"{operation}({', '.join(arguments)})"


def _describe(node: Node, arguments: list[NDArray[Any]]) -> str:
    """Writes what a node does with values, shortened."""
    texts = [str(array.tolist()) for array in arguments]
    return _words(node.operation, [t if len(t) <= 40 else f"{t[:40]}..." for t in texts])


def _split(text: str) -> list[str]:
    """Splits at the commas that no bracket holds."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(name: str, text: str) -> NDArray[np.float64]:
    try:
        value = json.loads(text) if text.startswith("[") else float(text)
        if not _only_numbers(value):
            raise ValueError
        array = np.array(value, dtype=np.float64)
        if not np.isfinite(array).all() or array.ndim > 2 or array.size == 0:
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise InputError(
            f"--at: {name}: expected a finite number, [1,2,...] or [[1,2],[3,4]]; "
            f"received {text[:40]!r}"
        ) from None
    return array


def _only_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(_only_numbers(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mistake(column: int, reason: str) -> InputError:
    return InputError(f"expression, column {column}: {reason}")
