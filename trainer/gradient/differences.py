"""Numeric differentiation: central differences in float64, extrapolated to a step of zero.

The extrapolation and its error estimate follow C. J. F. Ridders, Accurate computation of F'(x) and
F'(x)F''(x), Advances in Engineering Software 4 (1982) 75-76. scipy.differentiate is not used: it
accepts abs(w) at 0, fails beside a singularity, and computes first derivatives only.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from trainer.errors import InputError
from trainer.gradient.expression import CONSTANTS, NUMPY, Array, Expression

_EPSILON = float(np.finfo(np.float64).eps)
_HALVINGS = 16
_LEFT, _CENTRAL, _RIGHT = -1.0, -0.5, 0.0  # starts of a difference, in steps from the point


def derive(expression: Expression, wrt: Sequence[str], order: int) -> tuple[Array, Array]:
    """Differentiates an expression from its values near the point.

    Args:
        expression: The expression and the point.
        wrt: Names of the variables.
        order: 1 or 2; up to 4 for one input.

    Returns:
        The derivative, float64 [outputs, inputs] with one more axis of inputs for each further
        order, and its estimated absolute error, of the same shape.

    Raises:
        InputError: The derivatives from the left and from the right differ.
    """
    function = _Function(expression, wrt)
    size = len(function.point)
    derivative, error = np.empty((2, expression.value.size, *[size] * order))
    with np.errstate(all="ignore"):  # the expression may be undefined near the point
        steps = np.array([function.smooth_step(i, order) for i in range(size)])
        for index in itertools.combinations_with_replacement(range(size), order):
            found = function.extrapolate(index, steps)
            for permuted in set(itertools.permutations(index)):
                derivative[:, *permuted], error[:, *permuted] = found
    return derivative, error


class _Function:
    """An expression as a function of the elements of some variables: [inputs] -> [outputs]."""

    def __init__(self, expression: Expression, wrt: Sequence[str]) -> None:
        self.expression, self.wrt = expression, wrt
        self.point = expression.point(wrt)
        self.noise = expression.rounding_noise().ravel()
        # Shorter steps are rounded too much when they are added to the point.
        self.shortest = 32 * np.spacing(abs(self.point))

    def quotient(self, index: tuple[int, ...], steps: Array, start: float) -> Array:
        """Returns the difference quotient by each input of `index` in turn, [outputs].

        Args:
            index: The inputs.
            steps: float64, a step for each of them.
            start: Where a difference begins, in steps from the point.
        """
        total = np.zeros(len(self.noise))
        for ends in itertools.product((0, 1), repeat=len(index)):
            moved = self.point.copy()
            np.add.at(moved, list(index), (start + np.array(ends)) * steps)
            values = self.expression.split(self.wrt, moved, np.reshape)
            value = self.expression.evaluate(NUMPY, CONSTANTS | values, np.float64)
            total += (-1) ** (len(index) - sum(ends)) * np.ravel(value)
        return np.asarray(total / math.prod(steps))

    def smooth_step(self, i: int, order: int) -> float:
        """Returns a step by input i within which all derivatives exist on both sides.

        Raises:
            InputError: The function has a kink, a pole or an edge at the point.
        """
        scale = max(1.0, 1e-4 * abs(self.point[i]))
        step = 2.0 ** round(math.log2(scale * _EPSILON ** (1 / (order + 4))))
        for lower in range(1, order + 1):
            step = self._require_smooth((i,) * lower, step)
        return step

    def _require_smooth(self, index: tuple[int, ...], step: float) -> float:
        """Returns the step or a part of it that does not reach a singularity.

        At a smooth point, the derivatives from the left and from the right, extrapolated to a step
        of 0, are equal. If they differ, a singularity may be near, and the step is halved. At a
        kink the difference keeps its size until rounding hides it.
        """
        i, order = index[0], len(index)
        shortest = max(self.shortest[i], np.finfo(np.float64).tiny ** (1 / order))
        faulty, sides = np.zeros(len(self.noise), np.bool_), np.empty((2, len(self.noise)))
        while step / 4 >= shortest:
            far, middle, near = (
                np.array(
                    [self.quotient(index, np.full(order, h), side) for side in (_LEFT, _RIGHT)]
                )
                for h in (step, step / 2, step / 4)
            )  # each [sides, outputs]
            before, sides = 2 * middle - far, 2 * near - middle
            jump, largest = abs(sides[1] - sides[0]), abs(sides).max(axis=0)
            rounding = 2 ** (order + 6) * self.noise / (step / 4) ** order
            agree = jump <= 1e-3 * largest + rounding  # False for nan
            if agree.all():
                return step
            hidden = rounding >= 1e-3 * largest
            if hidden.all() or (hidden & faulty).any():
                break
            faulty = ~agree & ~(jump <= 0.9 * abs(before[1] - before[0]))
            step /= 2
        if not faulty.any():
            return step
        left, right = sides[:, int(np.argmax(faulty))]
        raise InputError(
            f"the expression is not differentiable at {self.expression.labels(self.wrt)[i]} = "
            f"{float(self.point[i])!r}, or within {step:.1g} of it: its "
            f"{'slope' if order == 1 else f'derivative of order {order}'} is {left:.4g} on the "
            f"left and {right:.4g} on the right; choose another point"
        )

    def extrapolate(self, index: tuple[int, ...], steps: Array) -> tuple[Array, Array]:
        """Returns a derivative of every output and its estimated error, each [outputs]."""
        own, shortest = steps[list(index)], self.shortest[list(index)]
        halved = [own / 2**n for n in range(_HALVINGS) if n < 3 or (own / 2**n >= shortest).all()]
        table = np.array([self.quotient(index, h, _CENTRAL) for h in halved])
        # The error of a quotient is a series in h**2. Each extrapolation removes one of its terms,
        # and together they multiply rounding errors by up to 8.
        once = (4 * table[1:] - table[:-1]) / 3
        twice = (16 * once[1:] - once[:-1]) / 15
        errors = np.maximum(abs(twice - once[1:]), abs(twice - once[:-1]))
        rounding = [8 * 2 ** len(index) * self.noise / math.prod(h) for h in halved]
        errors = np.fmax(np.where(np.isfinite(errors), errors, np.inf), rounding[2:])
        best = errors.argmin(axis=0)[None]
        return np.take_along_axis(twice, best, 0)[0], np.take_along_axis(errors, best, 0)[0]
