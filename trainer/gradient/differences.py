"""Numeric differentiation: central differences in float64, extrapolated to a step of zero.

Sources: the step of a central difference, cbrt(eps) times the scale of x, is formula 5.7.8 of Press
et al., Numerical Recipes (3rd ed., 2007); the extrapolation with its estimate of the error is
C. J. F. Ridders, Accurate computation of F'(x) and F'(x)F''(x), Advances in Engineering Software 4
(1982) 75-76, as told there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.gradient.expression import Expression, evaluate, largest_part

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

_EPSILON = float(np.finfo(np.float64).eps)
_SHRINK = (
    1.4  # from step to step, as in Numerical Recipes: no whole number, so no period is met twice
)
_STEPS = 60
# In units of eps times the largest part: the columns of the table multiply rounding by up to 8, and
# an expression rounds more often than once. Too little would prefer steps that are too small.
_ROUNDING = 64
_COLUMNS = 5  # of the table of extrapolations: rows that met a kink far away are left behind


@dataclass(frozen=True)
class Differences:
    """What differences say.

    Attributes:
        value: Of the expression, float64.
        derivative: As `tape.Taped` has it.
        error: Its estimated error, absolute, of the same shape.
    """

    value: Array
    derivative: Array
    error: Array


def derive(expression: Expression, wrt: Sequence[str], order: int) -> Differences:
    """Differentiates an expression by evaluating it beside its point.

    Args:
        expression: With a value for every name.
        wrt: Names of the variables.
        order: 1 or 2; up to 4 where there is one input.

    Raises:
        InputError: The expression is not differentiable there, as the two sides tell.
    """
    point = np.concatenate([expression.at[name].ravel() for name in wrt])
    labels = [label for name in wrt for label in element_names(name, expression.at[name].shape)]

    def function(moved: Array) -> Array:
        values, start = dict(expression.at), 0
        for name in wrt:
            old = expression.at[name]
            values[name] = moved[start : start + old.size].reshape(old.shape)
            start += old.size
        return evaluate(expression, values).reshape(-1)

    with np.errstate(all="ignore"):  # beside the point may be where it is not defined
        for lower in range(1, order + 1):
            for number, label in enumerate(labels):
                _require_two_sides(function, point, number, lower, label)
        derivative, error = _all_derivatives(function, point, order, largest_part(expression))
    return Differences(evaluate(expression, expression.at), derivative, error)


def _all_derivatives(
    function: Function, point: Array, order: int, largest: float
) -> tuple[Array, Array]:
    """Returns every derivative of an order and its estimated error, [outputs, inputs, ...]."""
    shape = (function(point).size, *[len(point)] * order)
    derivative, error = np.empty(shape), np.empty(shape)
    for index in np.ndindex(*shape[1:]):
        place = (slice(None), *index)
        if list(index) != sorted(index):  # derivatives do not depend on the order of variables
            first = (slice(None), *sorted(index))
            derivative[place], error[place] = derivative[first], error[first]
        else:
            derivative[place], error[place] = _extrapolated(function, point, index, largest)
    return derivative, error


def element_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns a name for each element: "w", or "A[0,1]"."""
    return [
        f"{name}[{','.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)
    ]


def _scales(x: float) -> list[float]:
    """Returns what a step is measured by: 1 and x itself, the smaller one first."""
    least = 1e-4 * abs(x)  # a step below would be lost in the rounding of x + step
    return sorted({max(1.0, least), abs(x)} - {0.0})


def _extrapolated(
    function: Function, point: Array, index: tuple[int, ...], largest: float
) -> tuple[Array, Array]:
    """Returns one derivative of every output, and its estimated error, by the best scale.

    Args:
        function: From inputs to outputs.
        point: The inputs.
        index: By which inputs to differentiate, one after the other.
        largest: Magnitude of a part of the function, by which it is rounded.
    """
    outputs = function(point).size
    best, least = np.zeros(outputs), np.full(outputs, np.inf)
    for which in (0, -1):
        starts = {n: 0.05 * _scales(point[n])[which] for n in set(index)}
        former: list[Array] = []
        for number in range(_STEPS):
            steps = {n: _exact_step(start / _SHRINK**number) for n, start in starts.items()}
            row = [_quotient(function, point, index, steps)]
            # Quotients that are alike because all of them were rounded to nothing prove nothing.
            rounding = _ROUNDING * _EPSILON * largest
            rounding *= 2 ** len(index) / math.prod(steps[n] for n in index)
            if (rounding > least).all():
                break  # and more so with each smaller step
            # The error of a central difference is a series in h**2: each column takes a term away.
            for column in range(1, min(len(former) + 1, _COLUMNS)):
                factor = _SHRINK ** (2 * column)
                row.append((factor * row[-1] - former[column - 1]) / (factor - 1))
                error = np.maximum(abs(row[-1] - row[-2]), abs(row[-1] - former[column - 1]))
                error = np.maximum(error, rounding)
                better = error < least  # never where it is not finite
                best, least = np.where(better, row[-1], best), np.where(better, error, least)
            former = row
        if (least < 1e-9 * abs(best)).all():
            break
    return np.where(np.isfinite(least), best, np.nan), least


def _quotient(
    function: Function, point: Array, index: tuple[int, ...], steps: dict[int, float]
) -> Array:
    """Returns the central difference quotient of an order, by each variable of `index` in turn."""
    total: Array | float = 0.0
    for choice in np.ndindex(*[2] * len(index)):
        moved = point.copy()
        for n, side in zip(index, choice, strict=True):
            moved[n] += steps[n] / 2 if side == 0 else -steps[n] / 2
        total = total + (-1) ** sum(choice) * function(moved)
    return np.asarray(total / math.prod(steps[n] for n in index))


def _exact_step(step: float) -> float:
    """Returns nearly `step`, with few digits, so that x + step/2 and x - step/2 hardly round."""
    mantissa, exponent = math.frexp(step)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def _require_two_sides(
    function: Function, point: Array, number: int, order: int, label: str
) -> None:
    """Refuses a point where the derivative from the left is not that from the right.

    Both sides' quotients differ by about h times the next derivative, which two steps take away:
    what is left at h = 0, and stays as large where the steps are halved, is a jump.

    Raises:
        InputError: The sides differ, or one of them does not exist.
    """
    for scale in _scales(point[number]):
        step = _exact_step(scale * _EPSILON ** (1 / (order + 2)))
        wide, near, nearest = (
            _sides(function, point, number, order, h) for h in (step, step / 2, step / 4)
        )
        if not (np.isfinite(wide).all() and np.isfinite(near).all()):
            side = -step if not np.isfinite(wide[0]).all() else step
            raise InputError(
                f"the expression is not differentiable at {label} = {point[number]:g}: it is not "
                f"finite beside it, at {label} = {point[number] + side:g}; choose another point"
            )
        left, right = 2 * nearest - near  # extrapolated to a step of zero
        jump, former = abs(right - left), abs(np.diff(2 * near - wide, axis=0)[0])
        largest = np.maximum(abs(left), abs(right))
        noise = 2 ** (order + 6) * _EPSILON * abs(function(point)) / (step / 4) ** order
        jumps = (jump > 1e-3 * largest + noise) & (jump > 0.9 * former)
        if jumps.any():
            at = int(np.argmax(jumps))
            what = "slope" if order == 1 else f"derivative of order {order}"
            raise InputError(
                f"the expression is not differentiable at {label} = {point[number]:g}: its {what} "
                f"is {left[at]:.4g} on the left and {right[at]:.4g} on the right; "
                "choose another point"
            )
        if (noise < 1e-3 * largest).all():
            return  # this step could tell: a larger one may reach a jump that is elsewhere


def _sides(function: Function, point: Array, number: int, order: int, step: float) -> Array:
    """Returns the one-sided difference quotients of an order, left and right, [2, outputs]."""
    sides = []
    for direction in (-1, 1):
        total: Array | float = 0.0
        for i in range(order + 1):
            moved = point.copy()
            moved[number] += direction * i * step
            weight = (-1) ** (order - i) * math.comb(order, i)
            total = total + weight * function(moved)
        sides.append(np.asarray(total / (direction * step) ** order))
    return np.stack(sides)
