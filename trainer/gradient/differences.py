"""Numeric differentiation: central differences with so many digits that rounding does not matter.

mpmath computes with any number of digits. The step can therefore be much shorter than the distance
from a float64 point to a singularity beside it. scipy.differentiate computes in float64: it accepts
abs(w) at 0, fails beside a singularity, and has first derivatives only.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.gradient.expression import Array, Expression, element_operations

# Relative to the point, or absolute at 0: about 1e-53.
STEP = mpmath.mpf(2) ** -176
DIGITS = 400  # a fourth difference cancels 4 * 53 of them
_LEFT, _CENTRAL, _RIGHT = -1, -0.5, 0  # where a difference begins, in steps from the point
_OPERATIONS = element_operations(mpmath, mpmath.sign)


def derive(expression: Expression, wrt: Sequence[str], order: int) -> Array:
    """Differentiates an expression at its point from values near it.

    Returns:
        The derivative, float64 [outputs, inputs] with one more axis of inputs for each further
        order.

    Raises:
        InputError: The derivatives from the left and from the right differ.
    """
    inputs = range(len(expression.labels(wrt)))
    derivative = np.empty((expression.value.size, *[len(inputs)] * order))
    with mpmath.workdps(DIGITS):
        for i, lower in itertools.product(inputs, range(1, order + 1)):
            _require_smooth(expression, wrt, (i,) * lower)
        for index in itertools.combinations_with_replacement(inputs, order):
            found = _quotient(expression, wrt, index, STEP, _CENTRAL)
            for permuted in set(itertools.permutations(index)):
                derivative[:, *permuted] = found
    return derivative


def _require_smooth(expression: Expression, wrt: Sequence[str], index: tuple[int, ...]) -> None:
    """Refuses a kink, a pole or an edge at the point.

    The jump from the derivative on the left to that on the right is proportional to the step at a
    smooth point. At a kink it does not depend on the step.
    """
    left, right = (_quotient(expression, wrt, index, STEP, side) for side in (_LEFT, _RIGHT))
    shorter = STEP / 1024
    near = [_quotient(expression, wrt, index, shorter, side) for side in (_LEFT, _RIGHT)]
    jump, near_jump = abs(right - left), abs(near[1] - near[0])
    smooth = (near_jump <= jump / 2) | (near_jump < 1e-100)  # False for nan
    if not smooth.all():
        output = int(np.argmin(smooth))
        what = "slope" if len(index) == 1 else f"derivative of order {len(index)}"
        raise InputError(
            f"the expression is not differentiable at {expression.labels(wrt)[index[0]]} = "
            f"{float(expression.point(wrt)[index[0]])!r}: its {what} is "
            f"{float(near[0][output]):.4g} on the left and {float(near[1][output]):.4g} on the "
            "right (nan: not defined there); choose another point"
        )


def _quotient(
    expression: Expression, wrt: Sequence[str], index: tuple[int, ...], step: Any, start: float
) -> NDArray[Any]:
    """Returns the difference quotient by each input of `index` in turn, mpmath [outputs]."""
    point = np.array([mpmath.mpf(number) for number in expression.point(wrt).tolist()], object)
    steps = [step * (abs(point[i]) or 1) for i in index]
    total: Any = 0
    for ends in itertools.product((0, 1), repeat=len(index)):
        moved = point.copy()
        for i, h, end in zip(index, steps, ends, strict=True):
            moved[i] += (start + end) * h
        value = _evaluate(expression, expression.split(wrt, moved, np.reshape))
        total = total + (-1) ** (len(index) - sum(ends)) * value
    return np.asarray(total / math.prod(steps))


def _evaluate(expression: Expression, values: dict[str, Any]) -> NDArray[Any]:
    """Returns the outputs, mpmath [outputs]; nan if one is not real."""
    constants = {"pi": mpmath.pi, "e": mpmath.e}
    try:
        value = expression.evaluate(_OPERATIONS, constants | values, mpmath.mpf)
    except (ArithmeticError, TypeError):  # division by 0, comparison of complex numbers
        value = np.full(expression.value.shape, mpmath.nan)
    outputs = [
        number if isinstance(number, mpmath.mpf) else mpmath.nan for number in np.ravel(value)
    ]
    return np.array(outputs, object)
