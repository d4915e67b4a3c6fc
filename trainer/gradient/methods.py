"""The three methods: automatic, symbolic and numeric differentiation. They share no rules.

Each evaluates the same syntax tree with its own library. A derivative is an array [outputs, inputs]
with one more axis of inputs for each further order.
"""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import sympy
import tensorflow as tf
from numpy.typing import NDArray

from trainer.errors import InputError, expect
from trainer.gradient.expression import (
    CONSTANTS,
    ELEMENTARY,
    OPERATORS,
    Array,
    Expression,
    Library,
    element_operations,
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
    **dict.fromkeys(("@", "dot", "matmul"), functools.partial(tf.tensordot, axes=1)),
    "**": _power,
    "relu": tf.nn.relu,
    "sum": tf.reduce_sum,
    "mean": tf.reduce_mean,
    "transpose": tf.transpose,
}
_TENSORFLOW = Library(_TF_OPERATIONS, CONSTANTS, np.float64, tf.reshape)


def by_tape(expression: Expression, order: int) -> tuple[Array, Array, Any]:
    """Differentiates by tf.GradientTape, in float64, in a graph that TensorBoard shows.

    Returns:
        The value of the expression, the derivative, and the recorded tf.Graph.
    """

    def differentiate(x: Any, level: int) -> tuple[Any, Any]:
        """Returns value and derivative by all elements, with one tape around another."""
        if level == 0:
            with tf.name_scope("expression"):
                value = expression.evaluate(x, _TENSORFLOW)
                return value, tf.reshape(value, [-1])
        with tf.GradientTape() as tape:
            tape.watch(x)  # a tape records a tensor, unlike a tf.Variable, only if it watches it
            value, target = differentiate(x, level - 1)
        with tf.name_scope(f"derivative_{level}"):
            return value, tape.jacobian(target, x, unconnected_gradients="zero")

    point = tf.constant(expression.point)
    traced = tf.function(lambda x: differentiate(x, order), autograph=False).get_concrete_function(
        tf.TensorSpec.from_tensor(point, name="_".join(expression.wrt))
    )
    value, derivative = (np.array(tensor) for tensor in traced(point))
    return value, derivative, traced.graph


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


_SYMPY = Library(element_operations(sympy, Sign), {"pi": sympy.pi, "e": sympy.E}, _number)


def by_symbols(expression: Expression, order: int) -> tuple[Array, Array, NDArray[Any]]:
    """Differentiates by sympy's rules, then inserts the numbers of the point.

    Each element of a variable is a scalar symbol.

    Returns:
        The value of the expression, the derivative, and its formulas.

    Raises:
        InputError: The formulas are too long, or not finite at the point.
    """
    every = replace(expression, wrt=list(expression.at))
    symbols = np.array([sympy.Symbol(label) for label in every.labels], object)
    exact = [sympy.Float(number, _DIGITS) for number in every.point.tolist()]
    numbers = dict(zip(symbols, exact, strict=True))

    @functools.cache  # a Jacobian can have many equal elements
    def insert(formula: Any) -> float:
        number = sympy.sympify(formula).xreplace(numbers).evalf(_DIGITS)
        if not (number.is_number and number.is_extended_real and number.is_finite):
            raise InputError(
                f"the closed form {sympy.sstr(formula, full_prec=False)[:100]} is not finite at "
                f"this point ({number}): choose another point"
            )
        return float(number)

    to_float = np.vectorize(insert, otypes=[np.float64])
    differentiate = np.frompyfunc(functools.cache(sympy.diff), 2, 1)  # a Hessian is symmetric
    value = np.asarray(every.evaluate(symbols, _SYMPY), object)
    inputs = [sympy.Symbol(label) for label in expression.labels]
    formulas = value.ravel()
    for _ in range(order):
        parts = sum(1 + sympy.count_ops(formula) for formula in formulas.flat)
        shorter = "choose a shorter expression, fewer elements or a lower --order"
        expect(parts <= MAX_PARTS, "formulas", f"at most {MAX_PARTS} parts", f"{parts}; {shorter}")
        formulas = differentiate.outer(formulas, inputs)
    return to_float(value), to_float(formulas), formulas


_MPMATH = Library(
    element_operations(mpmath, mpmath.sign), {"pi": mpmath.pi, "e": mpmath.e}, mpmath.mpf
)


def by_differences(expression: Expression, order: int) -> Array:
    """Differentiates by central differences, with so many digits that rounding does not matter.

    Raises:
        InputError: The derivatives from the left and from the right differ.
    """
    point = [mpmath.mpf(number) for number in expression.point.tolist()]
    units = [abs(x) or 1 for x in point]  # the step is relative to the point, or absolute at 0

    def value(*offsets: Any) -> NDArray[Any]:
        """Returns the outputs beside the point, [outputs]; nan if one is not real."""
        moved = [x + unit * t for x, unit, t in zip(point, units, offsets, strict=True)]
        try:
            found = expression.evaluate(np.array(moved, object), _MPMATH)
        except (ArithmeticError, TypeError):  # division by 0, comparison of complex numbers
            found = np.full(expression.value.shape, mpmath.nan)
        outputs = [x if isinstance(x, mpmath.mpf) else mpmath.nan for x in np.ravel(found)]
        return np.array(outputs, object)

    @functools.cache
    def quotient(index: tuple[int, ...], direction: int = 0) -> NDArray[Any]:
        """Returns the difference quotient by each input of `index` in turn, [outputs]."""
        orders = [index.count(i) for i in range(len(point))]
        difference = mpmath.diff(value, [0] * len(point), orders, direction=direction)
        return np.asarray(difference / math.prod(units[i] for i in index))

    derivative = np.empty((expression.value.size, *[len(point)] * order))
    with mpmath.workprec(PRECISION):
        for (i, label), lower in itertools.product(enumerate(expression.labels), range(order)):
            left, right = (quotient((i,) * (lower + 1), direction) for direction in (-1, 1))
            # At a smooth point they differ by the step times the next derivative.
            smooth = abs(right - left) <= 1e-30 * abs(right) + 1e-40  # False for nan
            if not smooth.all():  # a kink, a pole or an edge
                k = int(np.argmin(smooth))
                raise InputError(
                    f"the expression is not differentiable at {label} = {float(point[i])!r}: its "
                    f"derivative of order {lower + 1} is {float(left[k]):.4g} on the left and "
                    f"{float(right[k]):.4g} on the right (nan: not defined there)"
                )
        for index in np.ndindex(*derivative.shape[1:]):
            derivative[:, *index] = quotient(tuple(sorted(index)))
    return derivative
