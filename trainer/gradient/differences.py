"""Numeric differentiation: central differences with so many digits that rounding does not matter.

`mpmath.diff` computes with any number of digits. Its step can therefore be much shorter than the
distance from a float64 point to a singularity beside it.
"""

import functools
import itertools
import math
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.gradient.expression import Array, Expression, Library, element_operations

# Bits of the result. mpmath takes a step of 2**-342, about 1e-103, and computes with 704 bits for
# the first order and 352 more for each further one, because a difference cancels that many.
PRECISION = 332
_LIBRARY = Library(
    element_operations(mpmath, mpmath.sign), {"pi": mpmath.pi, "e": mpmath.e}, mpmath.mpf
)


def derive(expression: Expression, order: int) -> Array:
    """Differentiates an expression at its point from values near it.

    Returns:
        The derivative, float64 [outputs, inputs] with one more axis of inputs for each further
        order.

    Raises:
        InputError: The derivatives from the left and from the right differ.
    """
    point = [mpmath.mpf(number) for number in expression.point.tolist()]
    units = [abs(x) or 1 for x in point]  # the step is relative to the point, or absolute at 0

    def value(*offsets: Any) -> NDArray[Any]:
        """Returns the outputs beside the point, [outputs]; nan if one is not real."""
        moved = [x + unit * t for x, unit, t in zip(point, units, offsets, strict=True)]
        try:
            found = expression.evaluate(np.array(moved, object), _LIBRARY)
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
