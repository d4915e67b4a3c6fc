"""Symbolic differentiation: sympy, one scalar symbol for each element."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.gradient.expression import CONSTANTS, Expression, Node

# Decimal digits: enough that what is left after rounding to float64 is exact.
_DIGITS = 40
# Parts of all formulas together: what sympy gets through in a few seconds.
MOST_PARTS = 5_000
MOST_DERIVATIVES = 100_000  # parts times inputs: many of them are 0 at once


class _Jump(sympy.Function):
    """A function that is constant but for a jump at 0; unlike sympy's, its derivative is 0."""

    def fdiff(self, argindex: int = 1) -> Any:  # noqa: ARG002
        """Returns 0, which holds everywhere but at the jump."""
        return sympy.Integer(0)


class Step(_Jump):
    """1 where its argument is positive, else 0."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        """Returns the number, where the argument is one."""
        return sympy.Integer(int(bool(x > 0))) if x.is_comparable else None


class Sign(_Jump):
    """1 where its argument is positive, -1 where it is negative, 0 at 0."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        """Returns the number, where the argument is one."""
        return sympy.Integer(bool(x > 0) - bool(x < 0)) if x.is_comparable else None


def _relu(x: Any) -> Any:
    return x * Step(x)


def _each(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of single formulas one of arrays of them."""
    return np.vectorize(function, otypes=[object])


_SYMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "negative": np.negative,
    "exp": _each(sympy.exp),
    "log": _each(sympy.log),
    "sqrt": _each(sympy.sqrt),
    "sin": _each(sympy.sin),
    "cos": _each(sympy.cos),
    "tan": _each(sympy.tan),
    "asin": _each(sympy.asin),
    "acos": _each(sympy.acos),
    "atan": _each(sympy.atan),
    "sinh": _each(sympy.sinh),
    "cosh": _each(sympy.cosh),
    "tanh": _each(sympy.tanh),
    "abs": _each(lambda x: x * Sign(x)),
    "sigmoid": _each(lambda x: 1 / (1 + sympy.exp(-x))),
    "relu": _each(_relu),
    "softplus": _each(lambda x: sympy.log(1 + sympy.exp(x))),
    "minimum": _each(lambda x, y: x - _relu(x - y)),
    "maximum": _each(lambda x, y: y + _relu(x - y)),
    "sum": np.sum,
    "mean": lambda x: np.sum(x) / sympy.Integer(np.size(x)),
    "dot": np.dot,
    "matmul": np.dot,
    "transpose": np.transpose,
}


@dataclass(frozen=True)
class Symbolic:
    """What the formulas say.

    Attributes:
        value: Of the expression, float64.
        derivative: As `tape.Taped` has it.
        formulas: sympy expressions, an object array of the derivative's shape.
    """

    value: NDArray[np.float64]
    derivative: NDArray[np.float64]
    formulas: NDArray[Any]


def derive(expression: Expression, wrt: Sequence[str], order: int) -> Symbolic:
    """Differentiates an expression by rules, then puts the numbers in.

    Args:
        expression: With a value for every name.
        wrt: Names of the variables.
        order: Of the derivative, from 1.

    Raises:
        InputError: The formulas become too long.
    """
    symbols = {name: _symbols(name, array.shape) for name, array in expression.at.items()}
    numbers = {
        symbol: sympy.Float(float(number), _DIGITS)
        for name, array in expression.at.items()
        for symbol, number in zip(symbols[name].flat, array.flat, strict=True)
    }
    value = _evaluate(expression, symbols)
    inputs = [symbol for name in wrt for symbol in symbols[name].flat]
    formulas = value.reshape(-1)
    for _ in range(order):
        _require_short(formulas, len(inputs))
        formulas = _derivatives(formulas, inputs)
    return Symbolic(_float(value, numbers), _float(formulas, numbers), formulas)


def _derivatives(formulas: NDArray[Any], inputs: list[Any]) -> NDArray[Any]:
    """Differentiates each formula by each input, [...] -> [..., inputs]."""
    found = np.empty((*formulas.shape, len(inputs)), dtype=object)
    known: dict[tuple[Any, Any], Any] = {}  # a Hessian is symmetric: half of it is there already
    for index in np.ndindex(*formulas.shape):
        formula: Any = formulas[index]
        for number, symbol in enumerate(inputs):
            key = (formula, symbol)
            if key not in known:
                known[key] = formula.diff(symbol)
            found[(*index, number)] = known[key]
    return found


def _require_short(formulas: NDArray[Any], inputs: int) -> None:
    parts = itertools.chain.from_iterable(map(sympy.preorder_traversal, formulas.flat))
    most = min(MOST_PARTS, MOST_DERIVATIVES // inputs)
    if sum(1 for _ in itertools.islice(parts, most + 1)) > most:
        raise InputError(
            f"the formulas have more than {most:,} parts, to be differentiated {inputs} times: "
            "expected a shorter expression, fewer elements or a lower --order"
        )


def _symbols(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    found = np.empty(shape, dtype=object)
    for index in np.ndindex(*shape):
        found[index] = sympy.Symbol("_".join(map(str, (name, *index))))
    return found


def _evaluate(expression: Expression, symbols: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    constants = {"pi": sympy.pi, "e": sympy.E}

    def walk(node: Node) -> NDArray[Any]:
        if node.operation == "number":
            return _objects(_exact(node.number))
        if node.operation == "name":
            name = node.name
            return _objects(constants[name]) if name in CONSTANTS else symbols[name]
        return _objects(_SYMPY[node.operation](*map(walk, node.arguments)))

    return walk(expression.root)


def _objects(value: Any) -> NDArray[Any]:
    # Operations on arrays of no dimension give back what was in them.
    return np.asarray(value, dtype=object)


def _exact(number: Any) -> Any:
    # Integers stay exact in the formulas, up to what float64 holds exactly too.
    if isinstance(number, int) and abs(number) <= 2**53:
        return sympy.Integer(number)
    return sympy.Float(repr(float(number)), _DIGITS)  # as written: 0.1 is to be shown as 0.1


def _float(formulas: NDArray[Any], numbers: Mapping[Any, Any]) -> NDArray[np.float64]:
    """Puts the numbers in.

    Raises:
        InputError: A formula is not a finite real number there, as w**b/w is not at w = 0.
    """
    known: dict[Any, float] = {}  # many elements of a large derivative are alike
    for formula in set(formulas.flat):
        number = sympy.sympify(formula).xreplace(numbers).evalf(_DIGITS)
        if not (number.is_number and number.is_extended_real and number.is_finite):
            raise InputError(
                f"the closed form {sympy.sstr(formula, full_prec=False)[:100]} is not finite at "
                f"this point ({number}): choose another point"
            )
        known[formula] = float(number)
    return np.array([known[formula] for formula in formulas.flat]).reshape(formulas.shape)
