"""The three methods: automatic, symbolic and numeric differentiation. They share no rules.

Each evaluates the same syntax tree with its own library. Derivatives are in the order of
`Expression.derivatives`.
"""

import functools
import itertools
import math
from typing import Any

import mpmath
import numpy as np
import sympy
import tensorflow as tf

from trainer.errors import InputError, expect
from trainer.gradient.expression import (
    CONSTANTS,
    ELEMENTARY,
    OPERATORS,
    Expression,
    Library,
    composed_operations,
)

MAX_PARTS = 5_000  # operations of all formulas; sympy needs seconds for this many
_DIGITS = 40  # decimal, of sympy; results are exact after rounding to float64
# Bits of mpmath's results. It takes a step of 2**-342, about 1e-103, much shorter than the distance
# from a float64 point to a singularity beside it. It computes with 704 bits for the first order and
# 352 more for each further one, because a difference cancels that many.
PRECISION = 332


def _power(base: Any, exponent: Any) -> Any:
    """Multiplies if the exponent is 0 to 4: the third derivative of tf.pow(x, 2.0) at 0 is nan."""
    if isinstance(exponent, np.floating) and exponent in range(5):
        return functools.reduce(tf.multiply, [base] * int(exponent), tf.ones_like(base))
    return tf.pow(base, exponent)


_TF_NAMES = (*ELEMENTARY, "abs", "sigmoid", "softplus", "minimum", "maximum")
_TF_OPERATIONS = {
    **OPERATORS,
    **{name: getattr(tf.math, name) for name in _TF_NAMES},
    "**": _power,
    "relu": tf.nn.relu,
}
_TENSORFLOW = Library(_TF_OPERATIONS, CONSTANTS, np.float64)


def by_tape(expression: Expression, order: int) -> tuple[float, list[float], Any]:
    """Differentiates by tf.GradientTape, in float64, in a graph that TensorBoard shows.

    Returns:
        The value of the expression, the derivatives, and the recorded tf.Graph.
    """
    at = {name: np.float64(number) for name, number in expression.at.items()}

    def differentiate(x: Any, level: int) -> tuple[Any, Any]:
        """Returns the value and all derivatives of a level, with one tape around another."""
        if level == 0:
            with tf.name_scope("expression"):
                variables = zip(expression.wrt, tf.unstack(x), strict=True)
                value = tf.convert_to_tensor(expression.evaluate(at | dict(variables), _TENSORFLOW))
                return value, value
        with tf.GradientTape() as tape:
            tape.watch(x)  # a tape records a tensor, unlike a tf.Variable, only if it watches it
            value, target = differentiate(x, level - 1)
        with tf.name_scope(f"derivative_{level}"):
            return value, tape.jacobian(target, x, unconnected_gradients="zero")

    point = tf.constant([at[name] for name in expression.wrt])
    traced = tf.function(lambda x: differentiate(x, order), autograph=False).get_concrete_function(
        tf.TensorSpec.from_tensor(point, name="_".join(expression.wrt))
    )
    value, found = (tensor.numpy() for tensor in traced(point))  # found: [inputs] * order
    places = itertools.combinations_with_replacement(range(len(expression.wrt)), order)
    return float(value), [float(found[place]) for place in places], traced.graph


class Sign(sympy.Function):
    """The sign of its argument: -1, 0 or 1, with a derivative of 0 everywhere.

    It replaces sympy's sign, Abs and Max: they have no usable derivative if sympy cannot prove that
    the argument is real, as for abs(log(w)), and a DiracDelta as second derivative.
    """

    @classmethod
    def eval(cls, x: Any) -> Any:
        """Returns the sign of a number, and None for a formula."""
        return sympy.Integer(bool(x > 0) - bool(x < 0)) if x.is_comparable else None

    def fdiff(self, argindex: int = 1) -> Any:  # noqa: ARG002
        """Returns the derivative, which is 0 except at the jump."""
        return sympy.Integer(0)


def _number(value: float) -> Any:
    """Returns an exact number, so that 2 is shown as 2 and 0.1 as 0.1."""
    return sympy.Integer(value) if isinstance(value, int) else sympy.Float(repr(value), _DIGITS)


_SYMPY = Library(composed_operations(sympy, Sign), {"pi": sympy.pi, "e": sympy.E}, _number)


def by_symbols(expression: Expression, order: int) -> tuple[float, list[float], list[str]]:
    """Differentiates by sympy's rules, then inserts the numbers of the point.

    Returns:
        The value of the expression, the derivatives, and their formulas.

    Raises:
        InputError: The formulas are too long, or not finite at the point.
    """
    symbols = {name: sympy.Symbol(name) for name in expression.at}
    numbers = {symbols[name]: sympy.Float(x, _DIGITS) for name, x in expression.at.items()}

    def insert(formula: Any) -> float:
        number = formula.xreplace(numbers).evalf(_DIGITS)
        if not (number.is_number and number.is_extended_real and number.is_finite):
            raise InputError(
                f"the closed form {sympy.sstr(formula, full_prec=False)[:100]} is not finite at "
                f"this point ({number}): choose another point"
            )
        return float(number)

    value = expression.evaluate(symbols, _SYMPY)
    formulas: dict[tuple[str, ...], Any] = {(): value}
    for level in range(1, order + 1):
        parts = sum(1 + sympy.count_ops(formula) for formula in formulas.values())
        shorter = "choose a shorter expression, fewer variables or a lower --order"
        expect(parts <= MAX_PARTS, "formulas", f"at most {MAX_PARTS} parts", f"{parts}; {shorter}")
        formulas = {
            names: sympy.diff(formulas[names[:-1]], symbols[names[-1]])
            for names in expression.derivatives(level)
        }
    texts = [sympy.sstr(formula, full_prec=False) for formula in formulas.values()]
    return insert(value), [insert(formula) for formula in formulas.values()], texts


_MPMATH = Library(
    composed_operations(mpmath, mpmath.sign), {"pi": mpmath.pi, "e": mpmath.e}, mpmath.mpf
)


def by_differences(expression: Expression, order: int) -> list[float]:
    """Differentiates by central differences, with so many digits that rounding does not matter.

    Raises:
        InputError: The derivatives from the left and from the right differ.
    """
    point = {name: mpmath.mpf(number) for name, number in expression.at.items()}
    # The step is relative to the point, or absolute at 0.
    units = {name: abs(point[name]) or 1 for name in expression.wrt}

    def value(*offsets: Any) -> Any:
        """Returns the value beside the point; nan if it is not real."""
        steps = zip(expression.wrt, offsets, strict=True)
        moved = {name: point[name] + units[name] * offset for name, offset in steps}
        try:
            found = expression.evaluate(point | moved, _MPMATH)
        except (ArithmeticError, TypeError):  # division by 0, comparison of complex numbers
            return mpmath.nan
        return found if isinstance(found, mpmath.mpf) else mpmath.nan

    def quotient(names: tuple[str, ...], direction: int = 0) -> Any:
        """Returns the difference quotient by each of these variables in turn."""
        orders = [names.count(name) for name in units]
        difference = mpmath.diff(value, [0] * len(units), orders, direction=direction)
        return difference / math.prod(units[name] for name in names)

    with mpmath.workprec(PRECISION):
        for name, lower in itertools.product(expression.wrt, range(1, order + 1)):
            left, right = (quotient((name,) * lower, direction) for direction in (-1, 1))
            # At a smooth point they differ by the step times the next derivative.
            if not abs(right - left) <= 1e-30 * abs(right) + 1e-40:  # also refuses nan
                raise InputError(  # a kink, a pole or an edge
                    f"the expression is not differentiable at {name} = {expression.at[name]!r}: "
                    f"its derivative of order {lower} is {float(left):.4g} on the left and "
                    f"{float(right):.4g} on the right (nan: not defined there)"
                )
        return [float(quotient(names)) for names in expression.derivatives(order)]
