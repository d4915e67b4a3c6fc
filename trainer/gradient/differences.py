"""Numeric differentiation: central differences in float64, extrapolated to a step of zero.

Sources: the step of a central difference, cbrt(eps) times the scale of x, is formula 5.7.8 of Press
et al., Numerical Recipes (3rd ed., 2007); the extrapolation with its estimate of the error is
C. J. F. Ridders, Accurate computation of F'(x) and F'(x)F''(x), Advances in Engineering Software 4
(1982) 75-76, as told there.

A singularity may be nearer than that step. The two sides of the point are compared with shorter and
shorter steps until they agree: from there the step grows as long as the quotient stays the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import InputError
from trainer.gradient.expression import Expression, evaluate, rounding_noise

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

_EPSILON = float(np.finfo(np.float64).eps)
_SHRINK = 2  # from step to step: with powers of two, point + step and point - step are exact
_STEPS = 60
_SMALLEST = float(np.finfo(np.float64).tiny)  # of what quotients are divided by
# The shortest step, in units of the spacing of float64 numbers at the point.
_LEAST_SPACINGS = 32
# The columns of the table multiply rounding by up to 8. Too little would prefer steps that are too
# small.
_ROUNDING = 8
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
        noise = rounding_noise(expression).reshape(-1)
        safe_steps = [
            min(
                _safe_step(function, point, number, lower, noise, label)
                for lower in range(1, order + 1)
            )
            for number, label in enumerate(labels)
        ]
        derivative, error = _all_derivatives(function, point, order, safe_steps, noise)
    return Differences(evaluate(expression, expression.at), derivative, error)


def _all_derivatives(
    function: Function, point: Array, order: int, safe_steps: Sequence[float], noise: Array
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
            derivative[place], error[place] = _extrapolated(
                function, point, index, safe_steps, noise
            )
    return derivative, error


def element_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns a name for each element: "w", or "A[0,1]"."""
    return [
        f"{name}[{','.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)
    ]


def number_text(number: float) -> str:
    """Returns a number with as few digits as read back as the same float64, such as "1e-10"."""
    return repr(float(number)).removesuffix(".0")


def _extrapolated(
    function: Function,
    point: Array,
    index: tuple[int, ...],
    safe_steps: Sequence[float],
    noise: Array,
) -> tuple[Array, Array]:
    """Returns one derivative of every output, and its estimated error.

    Args:
        function: From inputs to outputs.
        point: The inputs.
        index: By which inputs to differentiate, one after the other.
        safe_steps: For each input, a step that reaches no singularity.
        noise: float64 [outputs], by how much rounding changes the outputs.
    """

    def rounding(steps: dict[int, float]) -> Array:
        scale: float = 2 ** len(index) / math.prod(steps[n] for n in index)
        return _ROUNDING * scale * noise

    starts = {n: safe_steps[n] for n in set(index)}
    quotient = _quotient(function, point, index, starts)
    for n in starts:
        # The quotient of a step that reaches a singularity or another period is another number.
        while 2 * starts[n] <= 0.05 * max(1.0, abs(point[n])):
            longer = starts | {n: 2 * starts[n]}
            following = _quotient(function, point, index, longer)
            allowed = 1e-3 * abs(quotient).max() + rounding(starts) / _ROUNDING
            if not (abs(following - quotient) <= allowed).all():
                break
            starts, quotient = longer, following
    outputs = quotient.size
    best, least = np.zeros(outputs), np.full(outputs, np.inf)
    former: list[Array] = []
    for number in range(_STEPS):
        steps = {n: start / _SHRINK**number for n, start in starts.items()}
        # Quotients that are alike because all of them were rounded to nothing prove nothing.
        if (rounding(steps) > least).all() or any(
            step < _LEAST_SPACINGS * np.spacing(abs(point[n])) for n, step in steps.items()
        ):
            break  # and more so with each smaller step
        row = [_quotient(function, point, index, steps)]
        # The error of a central difference is a series in h**2: each column takes a term away.
        for column in range(1, min(len(former) + 1, _COLUMNS)):
            factor = _SHRINK ** (2 * column)
            row.append((factor * row[-1] - former[column - 1]) / (factor - 1))
            error = np.maximum(abs(row[-1] - row[-2]), abs(row[-1] - former[column - 1]))
            error = np.maximum(error, rounding(steps))
            better = error < least  # never where it is not finite
            best, least = np.where(better, row[-1], best), np.where(better, error, least)
        former = row
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


def _safe_step(
    function: Function, point: Array, number: int, order: int, noise: Array, label: str
) -> float:
    """Returns a step, a power of two, within which the function is smooth on both sides.

    A singularity that is near, but not at the point, is found by shrinking the step.

    Raises:
        InputError: Down to the shortest step that rounding allows, the derivative from the left is
            not that from the right, or one of them does not exist.
    """
    x = float(point[number])
    scale = max(1.0, 1e-4 * abs(x))
    step = 2.0 ** round(math.log2(scale * _EPSILON ** (1 / (order + 2))))
    least = max(_LEAST_SPACINGS * float(np.spacing(abs(x))), _SMALLEST ** (1 / order))
    fault, faulty = "", np.zeros(len(noise), np.bool_)
    while step / 4 >= least:
        found = _compare_sides(function, point, number, order, noise, step)
        if found.agree.all():
            return step
        if found.hidden.all() or (found.hidden & faulty).any():
            break  # and more so with each smaller step
        fault, faulty = found.fault, found.faulty
        step /= 2
    if not fault:
        return step
    raise InputError(
        f"the expression is not differentiable at {label} = {number_text(x)}, "
        f"or within {step:.1g} of it: {fault}; choose another point"
    )


@dataclass(frozen=True)
class _Sides:
    """How the function behaves on the two sides of a point, as one step shows it.

    Attributes:
        agree: bool [outputs]: the derivative from the left is that from the right.
        faulty: bool [outputs]: they differ, and by as much as with a longer step.
        hidden: bool [outputs]: rounding hides whether they differ.
        fault: The first fault in words; empty: there is none.
    """

    agree: NDArray[np.bool_]
    faulty: NDArray[np.bool_]
    hidden: NDArray[np.bool_]
    fault: str = ""


def _compare_sides(
    function: Function, point: Array, number: int, order: int, noise: Array, step: float
) -> _Sides:
    """Compares the derivative from the left with that from the right.

    Both sides' quotients differ by about h times the next derivative, which two steps take away:
    what is left at h = 0, and stays as large where the steps are halved, is a jump.
    """
    wide, near, did_you_mean = (
        _sides(function, point, number, order, h) for h in (step, step / 2, step / 4)
    )
    finite = np.isfinite(wide) & np.isfinite(near) & np.isfinite(did_you_mean)  # [sides, outputs]
    if not finite.all():
        side = "right" if finite[0].all() else "left"
        faulty: Any = ~finite.all(axis=0)
        nowhere = np.zeros_like(faulty)
        return _Sides(nowhere, faulty, nowhere, f"it is not finite beside it, on the {side}")
    left, right = 2 * did_you_mean - near  # extrapolated to a step of zero
    jump, former = abs(right - left), abs(np.diff(2 * near - wide, axis=0)[0])
    largest = np.maximum(abs(left), abs(right))
    rounding = 2 ** (order + 6) * noise / (step / 4) ** order
    agree = jump <= 1e-3 * largest + rounding
    faulty = ~agree & (jump > 0.9 * former)
    fault = ""
    if faulty.any():
        at = int(np.argmax(faulty))
        what = "slope" if order == 1 else f"derivative of order {order}"
        fault = f"its {what} is {left[at]:.4g} on the left and {right[at]:.4g} on the right"
    return _Sides(agree, faulty, rounding >= 1e-3 * largest, fault)


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
