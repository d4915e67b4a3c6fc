"""Compares the derivative of an expression by three methods."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.errors import InputError, did_you_mean
from trainer.gradient.expression import Array, Expression, parse, parse_values
from trainer.gradient.result import GradientResult

DEFAULT_EXPRESSION, DEFAULT_AT, DEFAULT_WRT = "a*w**2 + b*w + c", "a=1,b=2,c=3,w=4", "w"
MAX_HESSIAN = 16  # elements: 136 second derivatives, each by three methods
MAX_ORDER = 4
MAX_WORK = 50_000  # operations on single numbers times inputs; mpmath needs seconds for this many
TOLERANCE = 1e-6  # the relative disagreement that rounding of float64 may cause
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
    names = _variables(expression, wrt, order)
    found, formulas, graph = _differentiate(expression, names, order)
    disagreement = _disagreement(expression, found)
    agree = disagreement <= TOLERANCE  # False for nan
    methods = {
        name: {"value": value, "derivative": _squeeze(expression, names, derivative)}
        for name, (value, derivative) in found.items()
    }
    closed_forms = _closed_forms(expression, names, formulas)
    heading = _quotient([names[0] if len(names) == 1 else f"({', '.join(names)})"] * order)
    return GradientResult(
        title=f"{expression.text} at {at}",
        passed=agree,
        verdict=f"the three {'agree' if agree else 'DISAGREE'}: largest relative disagreement "
        f"{disagreement:.1e}, tolerance {TOLERANCE:.0e}",
        notes=_notes(expression, names, closed_forms),
        table=[
            {"method": name, "value": _text(each["value"]), heading: _text(each["derivative"])}
            for name, each in methods.items()
        ],
        numbers={
            "expression": expression.text,
            "at": expression.at,
            "wrt": list(names),
            "order": order,
            "inputs": expression.labels(names),
            "methods": methods,
            "formulas": closed_forms,
            "agree": agree,
            "largest_relative_disagreement": disagreement,
            "tolerance": TOLERANCE,
        },
        graph=graph,
    )


def _differentiate(
    expression: Expression, names: Sequence[str], order: int
) -> tuple[dict[str, tuple[Array, Array]], Any, Any]:
    """Returns value and derivative by method, the symbolic formulas, and the recorded graph."""
    # TensorFlow and sympy need seconds to import. Mistakes are reported before that.
    from trainer.gradient import differences, symbols, tape

    numeric = differences.derive(expression, names, order)
    symbolic_value, symbolic, formulas = symbols.derive(expression, names, order)
    taped_value, taped, graph = tape.derive(expression, names, order)
    found = {
        "tf.GradientTape": (taped_value, taped),
        "symbolic (sympy)": (symbolic_value, symbolic),
        "central differences": (expression.value, numeric),
    }
    return found, formulas, graph


def _notes(
    expression: Expression, names: Sequence[str], closed_forms: Mapping[str, str]
) -> list[str]:
    independent = sorted({*names} - {*expression.names})
    return [
        *(f"{name} = {formula[:150]}" for name, formula in closed_forms.items()),
        *(
            f"the expression does not depend on {name}: GradientTape returns None instead of 0"
            for name in independent
        ),
        _WATCH,
    ]


def _variables(expression: Expression, wrt: str | None, order: int) -> tuple[str, ...]:
    """Returns the variables to differentiate by, if the order is possible for them."""
    used = expression.names
    if wrt is None and len(used) != 1:
        raise InputError(
            f"--wrt: expected the variables to differentiate by; available: {', '.join(used)}"
        )
    names = tuple(name.strip() for name in (wrt or used[0]).split(","))
    for name in names:
        if name not in expression.at or names.count(name) > 1:
            known = did_you_mean(name, expression.at)
            raise InputError(
                f"--wrt: expected names with a value, each once; received {wrt}; {known}"
            )
    if unused := sorted(expression.at.keys() - {*used, *names}):
        raise InputError(
            f"--at: {', '.join(unused)}: expected names of the expression or of --wrt; the "
            f"expression has {', '.join(used)}"
        )
    inputs = len(expression.labels(names))
    operations = expression.root.operations * expression.value.size * inputs
    if operations > MAX_WORK:
        raise InputError(
            f"{operations:,.0f} operations on single numbers times elements of --wrt: expected at "
            f"most {MAX_WORK:,}; choose a shorter expression or fewer elements"
        )
    highest = MAX_ORDER if inputs == 1 and not expression.value.shape else 2
    if not 1 <= order <= highest or (order > 1 and inputs > MAX_HESSIAN):
        raise InputError(
            f"--order: expected 1 to {highest} (3 and 4 only for one scalar variable of a scalar "
            f"expression; 2 for at most {MAX_HESSIAN} elements), received {order} for {inputs}"
        )
    return names


def _disagreement(expression: Expression, found: Mapping[str, tuple[Array, Array]]) -> float:
    """Returns the largest difference of value or derivative, relative to the largest method.

    Results of less than a millionth of the largest number, or 1e-40, are compared with that
    instead: they can consist of the rounding of float64, or of the step of the differences.
    """
    pairs = [np.stack(results) for results in zip(*found.values(), strict=True)]
    largest = np.max([abs(array).max() for array in (*pairs, *expression.at.values())])
    least = max(1e-6 * largest, 1e-40)
    differences = [np.ptp(part, 0) / np.maximum(abs(part).max(0), least) for part in pairs]
    return float(np.max([part.max() for part in differences]))  # nan if a result is not finite


def _squeeze(expression: Expression, names: Sequence[str], derivative: Array) -> Array:
    """Removes the axis of outputs of a scalar, and the axes of inputs of one scalar variable."""
    outputs = derivative.shape[:1] if expression.value.shape else ()
    inputs = () if expression.labels(names) == [names[0]] else derivative.shape[1:]
    return derivative.reshape(outputs + inputs)


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
