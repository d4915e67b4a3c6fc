"""Compares the derivative of an expression by three methods that share no code."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.errors import InputError, nearest
from trainer.gradient.expression import Array, Expression, parse, parse_values
from trainer.gradient.result import GradientResult, to_json

DEFAULT_EXPRESSION, DEFAULT_AT, DEFAULT_WRT = "a*w**2 + b*w + c", "a=1,b=2,c=3,w=4", "w"
MAX_ORDER = 4
MAX_HESSIAN = 16  # elements: 136 second derivatives, each by three methods
# The relative disagreement that rounding may cause, by order: each order divides by one more step.
TOLERANCES = {1: 1e-6, 2: 1e-5, 3: 1e-4, 4: 1e-3}
_WATCH = (
    "tape.watch: a tape records a tf.Variable automatically, but a tensor, as these values are, "
    "only after tape.watch(tensor)"
)


def derive(
    text: str | None = None, *, at: str | None = None, wrt: str | None = None, order: int = 1
) -> GradientResult:
    """Differentiates an expression by tape, by symbols and by differences, all in float64.

    Args:
        text: The expression; default: "a*w**2 + b*w + c".
        at: The value of each name: "a=1,x=[1,2,3],A=[[1,2],[3,4]]".
        wrt: The variables, separated by commas; not needed if there is only one.
        order: Order of the derivative: 1 or 2; up to 4 for one scalar variable of a scalar
            expression.

    Raises:
        InputError: An argument is wrong, or the expression is not finite or not differentiable at
            the point.
    """
    at = DEFAULT_AT if text is None and at is None else at or ""
    wrt = DEFAULT_WRT if text is None and wrt is None else wrt
    expression = parse(DEFAULT_EXPRESSION if text is None else text, parse_values(at))
    names = _variables(expression, wrt)
    _check_order(expression, names, order)
    # TensorFlow and sympy need seconds to import. Mistakes are reported before that.
    from trainer.gradient import differences, symbols, tape

    numeric, error = differences.derive(expression, names, order)
    symbolic_value, symbolic, formulas = symbols.derive(expression, names, order)
    taped_value, taped, graph = tape.derive(expression, names, order)
    found = {
        "tf.GradientTape": (taped_value, taped),
        "symbolic (sympy)": (symbolic_value, symbolic),
        "central differences": (expression.value, numeric),
    }
    disagreement = _disagreement(expression, found, error, TOLERANCES[order])
    agree = disagreement <= TOLERANCES[order]  # False for nan
    verdict = (
        f"the three {'agree' if agree else 'DISAGREE'}: largest relative disagreement "
        f"{disagreement:.1e}, tolerance {TOLERANCES[order]:.0e}"
    )
    methods = {
        name: {"value": value, "derivative": _squeeze(expression, names, derivative)}
        for name, (value, derivative) in found.items()
    }
    closed_forms = _closed_forms(expression, names, formulas)
    notes = [
        f"the expression does not depend on {name}: its derivative is 0; GradientTape returns None"
        for name in names
        if name not in expression.names
    ]
    heading = _quotient([names[0] if len(names) == 1 else f"({', '.join(names)})"] * order)
    return GradientResult(
        title=_shorten(f"{expression.text} at {at}"),
        passed=agree,
        verdict=verdict,
        lines=(*(_shorten(f"{k} = {v}") for k, v in closed_forms.items()), verdict, *notes, _WATCH),
        table=[
            {"method": name, "value": _text(each["value"]), heading: _text(each["derivative"])}
            for name, each in methods.items()
        ],
        document={
            "expression": expression.text,
            "at": {name: array.tolist() for name, array in expression.at.items()},
            "wrt": list(names),
            "order": order,
            "inputs": expression.labels(names),
            "methods": to_json(methods),
            "formulas": closed_forms,
            "agree": agree,
            "largest_relative_disagreement": to_json(disagreement),
            "tolerance": TOLERANCES[order],
            "estimated_error_of_differences": to_json(error.max()),
            "notes": [*notes, _WATCH],
        },
        graph=graph,
    )


def _variables(expression: Expression, wrt: str | None) -> tuple[str, ...]:
    used = expression.names
    if wrt is None and len(used) != 1:
        raise InputError(
            f"--wrt: expected the variables to differentiate by; available: {', '.join(used)}"
        )
    names = tuple(name.strip() for name in (wrt or used[0]).split(","))
    for name in names:
        if name not in expression.at:
            raise InputError(f"--wrt: {name!r} has no value: {nearest(name, expression.at)}")
    if len(set(names)) < len(names):
        raise InputError(f"--wrt: expected each name once, received {wrt}")
    unused = sorted(expression.at.keys() - {*used, *names})
    if unused:
        raise InputError(
            f"--at: {', '.join(unused)}: expected names of the expression or of --wrt; the "
            f"expression has {', '.join(used)}"
        )
    return names


def _check_order(expression: Expression, names: Sequence[str], order: int) -> None:
    inputs = sum(expression.at[name].size for name in names)
    if order > 1 and inputs > MAX_HESSIAN:
        raise InputError(
            f"--order {order}: expected at most {MAX_HESSIAN} elements to differentiate by, "
            f"received {inputs}"
        )
    highest = 2 if inputs > 1 or expression.value.shape else MAX_ORDER
    if not 1 <= order <= highest:
        raise InputError(
            f"--order: expected 1 to {highest} (3 and 4 only for one scalar variable of a scalar "
            f"expression), received {order}"
        )


def _disagreement(
    expression: Expression,
    found: Mapping[str, tuple[Array, Array]],
    error: Array,
    tolerance: float,
) -> float:
    """Returns the largest relative disagreement of value or derivative between two methods.

    It is relative to the largest result of the methods, or to a lower bound: if a derivative is 0,
    the result of the differences is their own error.

    Args:
        expression: The expression and the point.
        found: Value and derivative by method.
        error: Estimated error of the differences, of the derivative's shape. It is limited by the
            magnitude that rounding suggests, so that no estimate excuses a wrong derivative.
        tolerance: The largest disagreement that is accepted.
    """
    values, derivatives = (np.stack(part) for part in zip(*found.values(), strict=True))
    noise = expression.rounding_noise()
    magnitude = max(1.0, float(noise.max()) / np.finfo(np.float64).eps)
    bound = np.minimum(4 * error / tolerance, magnitude)
    bound = np.maximum(bound, 1e-6 * abs(derivatives).max())
    disagreements = []
    for results, lower_bound in ((values, 4 * noise / tolerance), (derivatives, bound)):
        spread = np.ptp(results, axis=0)
        scale = np.maximum(abs(results).max(axis=0), lower_bound)
        disagreements.append(np.max(spread / np.where(scale == 0, 1.0, scale)))
    return float(np.max(disagreements))  # nan if a method's result is not finite


def _squeeze(expression: Expression, names: Sequence[str], derivative: Array) -> Array:
    """Removes the axis of outputs of a scalar, and the axes of inputs of one scalar variable."""
    outputs = derivative.shape[:1] if expression.value.shape else ()
    single = len(names) == 1 and expression.at[names[0]].shape == ()
    return derivative.reshape(outputs if single else (*outputs, *derivative.shape[1:]))


def _closed_forms(expression: Expression, names: Sequence[str], formulas: Any) -> dict[str, str]:
    """Returns the formulas if everything is a scalar, each mixed derivative once."""
    import sympy

    if any(array.shape for array in expression.at.values()):
        return {}
    indices = itertools.combinations_with_replacement(range(len(names)), formulas.ndim - 1)
    return {
        _quotient([names[i] for i in index]): sympy.sstr(formulas[0, *index], full_prec=False)
        for index in indices
    }


def _quotient(names: Sequence[str]) -> str:
    """Returns the name of a derivative, such as "d/dw", "d2/dw2" or "d2/da dw"."""
    powers = {name: "" if count == 1 else count for name, count in Counter(names).items()}
    below = " ".join(f"d{name}{power}" for name, power in powers.items())
    return f"d{'' if len(names) == 1 else len(names)}/{below}"


def _text(array: Array) -> str:
    if array.shape == ():
        return f"{float(array):.12g}"
    return np.array2string(array, precision=6, separator=", ", threshold=36, edgeitems=2)


def _shorten(text: str) -> str:
    return text if len(text) <= 150 else f"{text[:147]}..."
