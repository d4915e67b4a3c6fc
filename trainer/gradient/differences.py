"""Numeric differentiation: central differences with so many digits that rounding does not matter.

mpmath computes with any number of digits. The step can therefore be much shorter than the distance
from a float64 point to a singularity beside it. scipy.differentiate computes in float64: it accepts
abs(w) at 0, fails beside a singularity, and has first derivatives only.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.gradient.expression import Array, Expression, element_operations

STEP = mpmath.mpf(2) ** -176  # about 1e-53; relative to the point, or absolute at 0
DIGITS = 60  # and 60 more for each order, because a difference of this step cancels 53 of them
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
    labels = expression.labels(wrt)
    derivative = np.empty((expression.value.size, *[len(labels)] * order))
    with mpmath.workdps(DIGITS * (1 + order)):
        function = _Function(expression, wrt)
        for i, lower in itertools.product(range(len(labels)), range(1, order + 1)):
            function.require_smooth((i,) * lower, labels[i])
        for index in itertools.combinations_with_replacement(range(len(labels)), order):
            found = function.quotient(index, STEP, _CENTRAL)
            for permuted in itertools.permutations(index):
                place: Any = (slice(None), *permuted)
                derivative[place] = found
    return derivative


class _Function:
    """An expression as a function of the elements of some variables, with mpmath numbers."""

    def __init__(self, expression: Expression, wrt: Sequence[str]) -> None:
        self.expression, self.wrt = expression, wrt
        self.point = [mpmath.mpf(number) for number in expression.point(wrt).tolist()]
        self.value = functools.cache(self._value)  # all quotients need the value at the point

    def require_smooth(self, index: tuple[int, ...], label: str) -> None:
        """Refuses a kink, a pole or an edge at the point.

        The jump from the derivative on the left to that on the right is proportional to the step at
        a smooth point. At a kink it does not depend on the step.
        """
        left, right = (self.quotient(index, STEP, side) for side in (_LEFT, _RIGHT))
        near_left, near_right = (
            self.quotient(index, STEP / 1024, side) for side in (_LEFT, _RIGHT)
        )
        jump = abs(near_right - near_left)
        smooth = (jump <= abs(right - left) / 2) | (jump < 1e-40)  # False for nan
        if not smooth.all():
            output = int(np.argmin(smooth))
            what = "slope" if len(index) == 1 else f"derivative of order {len(index)}"
            raise InputError(
                f"the expression is not differentiable at {label} = "
                f"{float(self.point[index[0]])!r}: its {what} is {float(near_left[output]):.4g} on "
                f"the left and {float(near_right[output]):.4g} on the right (nan: not defined "
                "there); choose another point"
            )

    def quotient(self, index: tuple[int, ...], step: Any, start: float) -> NDArray[Any]:
        """Returns the difference quotient by each input of `index` in turn, [outputs]."""
        steps = [step * (abs(self.point[i]) or 1) for i in index]
        total: Any = 0
        for ends in itertools.product((0, 1), repeat=len(index)):
            moved = self.point.copy()
            for i, h, end in zip(index, steps, ends, strict=True):
                moved[i] += (start + end) * h
            total = total + (-1) ** (len(index) - sum(ends)) * self.value(tuple(moved))
        return np.asarray(total / math.prod(steps))

    def _value(self, point: tuple[Any, ...]) -> NDArray[Any]:
        """Returns the outputs, [outputs]; nan if one is not real."""
        values = self.expression.split(self.wrt, np.array(point, object), np.reshape)
        values |= {"pi": mpmath.pi, "e": mpmath.e}
        try:
            value = self.expression.evaluate(_OPERATIONS, values, mpmath.mpf)
        except (ArithmeticError, TypeError):  # division by 0, comparison of complex numbers
            value = np.full(self.expression.value.shape, mpmath.nan)
        outputs = [x if isinstance(x, mpmath.mpf) else mpmath.nan for x in np.ravel(value)]
        return np.array(outputs, object)
