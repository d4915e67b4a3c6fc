"""Numeric differentiation: central differences in float64, extrapolated to a step of zero.

The extrapolation and its error estimate follow C. J. F. Ridders, Accurate computation of F'(x) and
F'(x)F''(x), Advances in Engineering Software 4 (1982) 75-76. scipy.differentiate is not used: it
accepts abs(w) at 0, fails beside a singularity, and computes first derivatives only.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trainer.errors import InputError
from trainer.gradient.expression import CONSTANTS, NUMPY, Array, Expression

_EPSILON = float(np.finfo(np.float64).eps)
_SMALLEST = float(np.finfo(np.float64).tiny)
_MIN_SPACINGS = 32  # the shortest step, in units of the spacing of float64 numbers at the point
_HALVINGS = 16
_LEFT, _CENTRAL, _RIGHT = -1.0, -0.5, 0.0  # where a difference begins, in steps from the point

Function = Callable[[Array], Array]


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
    point = np.concatenate([expression.at[name].ravel() for name in wrt])
    fixed = CONSTANTS | {**expression.at}

    def function(moved: Array) -> Array:
        values = fixed | expression.split(wrt, moved, np.reshape)
        return np.ravel(expression.evaluate(NUMPY, values, np.float64))

    noise = expression.rounding_noise().ravel()
    shape = (len(noise), *[len(point)] * order)
    derivative, error = np.empty(shape), np.empty(shape)
    with np.errstate(all="ignore"):  # the expression may be undefined near the point
        steps = []
        for i, label in enumerate(expression.labels(wrt)):
            scale = max(1.0, 1e-4 * abs(point[i]))
            step = 2.0 ** round(math.log2(scale * _EPSILON ** (1 / (order + 4))))
            for lower in range(1, order + 1):
                step = _smooth_step(function, point, (i,) * lower, step, noise, label)
            steps.append(step)
        for index in itertools.combinations_with_replacement(range(len(point)), order):
            found = _extrapolate(function, point, index, steps, noise)
            for permuted in set(itertools.permutations(index)):
                derivative[:, *permuted], error[:, *permuted] = found
    return derivative, error


def _smooth_step(
    function: Function,
    point: Array,
    index: tuple[int, ...],
    step: float,
    noise: Array,
    label: str,
) -> float:
    """Returns `step` or a part of it within which the function is smooth on both sides.

    At a smooth point, the derivatives from the left and from the right, extrapolated to a step of
    0, are equal. If they differ, a singularity may be near, and the step is halved. At a kink the
    difference keeps its size until rounding hides it.

    Raises:
        InputError: The function has a kink, a pole or an edge at the point.
    """
    order, x = len(index), float(point[index[0]])
    shortest = max(_MIN_SPACINGS * float(np.spacing(abs(x))), _SMALLEST ** (1 / order))
    faulty, sides = np.zeros(len(noise), np.bool_), np.empty((2, len(noise)))
    while step / 4 >= shortest:
        far, middle, near = (
            np.array(
                [_quotient(function, point, index, {index[0]: h}, side) for side in (_LEFT, _RIGHT)]
            )
            for h in (step, step / 2, step / 4)
        )  # each [sides, outputs]
        former, sides = 2 * middle - far, 2 * near - middle
        jump = abs(sides[1] - sides[0])
        largest = abs(sides).max(axis=0)
        rounding = 2 ** (order + 6) * noise / (step / 4) ** order
        agree = jump <= 1e-3 * largest + rounding  # False for nan
        if agree.all():
            return step
        hidden = rounding >= 1e-3 * largest
        if hidden.all() or (hidden & faulty).any():
            break
        faulty = ~agree & ~(jump <= 0.9 * abs(former[1] - former[0]))
        step /= 2
    if not faulty.any():
        return step
    left, right = sides[:, int(np.argmax(faulty))]
    what = "slope" if order == 1 else f"derivative of order {order}"
    raise InputError(
        f"the expression is not differentiable at {label} = {x!r}, or within {step:.1g} of it: its "
        f"{what} is {left:.4g} on the left and {right:.4g} on the right; choose another point"
    )


def _extrapolate(
    function: Function,
    point: Array,
    index: tuple[int, ...],
    steps: Sequence[float],
    noise: Array,
) -> tuple[Array, Array]:
    """Returns one derivative of every output and its estimated error, each [outputs].

    Args:
        function: Maps inputs to outputs.
        point: The inputs.
        index: The inputs to differentiate by, one after the other.
        steps: For each input, a step within which the function is smooth.
        noise: float64 [outputs], how much rounding changes the outputs.
    """
    rows, rounding = [], []
    for halving in range(_HALVINGS):
        h = {n: steps[n] / 2**halving for n in index}
        if any(step < _MIN_SPACINGS * np.spacing(abs(point[n])) for n, step in h.items()):
            break
        rows.append(_quotient(function, point, index, h, _CENTRAL))
        # The extrapolation multiplies rounding errors by up to 8.
        rounding.append(8 * 2 ** len(index) * noise / math.prod(h[n] for n in index))
    # The error of a quotient is a series in h**2. Each extrapolation removes one of its terms.
    table = np.array(rows)
    once = (4 * table[1:] - table[:-1]) / 3
    twice = (16 * once[1:] - once[:-1]) / 15
    errors = np.maximum(abs(twice - once[1:]), abs(twice - once[:-1]))
    errors = np.fmax(np.where(np.isfinite(errors), errors, np.inf), rounding[2:])
    best = errors.argmin(axis=0)[None]
    return np.take_along_axis(twice, best, 0)[0], np.take_along_axis(errors, best, 0)[0]


def _quotient(
    function: Function,
    point: Array,
    index: tuple[int, ...],
    steps: Mapping[int, float],
    start: float,
) -> Array:
    """Returns the difference quotient by each input of `index` in turn, [outputs]."""
    total = np.zeros(())
    for ends in itertools.product((0, 1), repeat=len(index)):
        moved = point.copy()
        for n, end in zip(index, ends, strict=True):
            moved[n] += (start + end) * steps[n]
        total = total + (-1) ** (len(index) - sum(ends)) * function(moved)
    return np.asarray(total / math.prod(steps[n] for n in index))
