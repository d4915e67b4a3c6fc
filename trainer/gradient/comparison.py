"""Compares the derivative of an expression by three methods."""

import ast
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import InputError, expect
from trainer.gradient.expression import CONSTANTS, Array, Expression, parse, parse_values

DEFAULT_EXPRESSION, DEFAULT_AT, DEFAULT_WRT = "a*w**2 + b*w + c", "a=1,b=2,c=3,w=4", "w"
MAX_DERIVATIVES = 256  # of each output, each by three methods
MAX_ORDER = 4
TOLERANCE = 1e-6  # the relative disagreement that rounding of float64 may cause
_WATCH = (
    "tape.watch: a tape records a tf.Variable automatically, but a tensor, as these values are, "
    "only after tape.watch(tensor)"
)


@dataclass(frozen=True, kw_only=True)
class GradientResult:
    """A comparison of gradients, of an expression or of a network."""

    title: str  # what was compared
    passed: bool  # whether the methods agree
    verdict: str  # a line that states whether and how well they agree
    table: list[dict[str, str]]  # rows of column title and text
    document: dict[str, Any]  # the JSON document; "notes" are more lines
    graph: Any = None  # the recorded operations, a tf.Graph; None for a network


def derive(
    text: str | None = None, *, at: str | None = None, wrt: str | None = None, order: int = 1
) -> GradientResult:
    """Differentiates an expression by tape, by symbols and by differences, all in float64.

    Args:
        text: The expression; default: "a*w**2 + b*w + c".
        at: The value of each name: "a=1,x=[1,2,3],A=[[1,2],[3,4]]".
        wrt: The variables, separated by commas; default: all variables of the expression.
        order: Order of the derivative, 1 to 4.

    Raises:
        InputError: An argument is wrong, or the expression is not finite or not differentiable at
            the point.
    """
    if text is None:
        text, at, wrt = DEFAULT_EXPRESSION, at or DEFAULT_AT, wrt or DEFAULT_WRT
    try:
        expression = parse(text, parse_values(at or ""), wrt)
        found, formulas, graph = _differentiate(expression, order)
    except RecursionError:
        raise InputError("the expression is nested too deeply") from None
    from trainer.training.callbacks import to_json

    disagreement = _disagreement(expression, found)
    agree = disagreement <= TOLERANCE  # False for nan
    heading = f"derivative by {', '.join(expression.wrt)}"
    forms = _closed_forms(expression, formulas)
    facts = {
        "expression": expression.text,
        "wrt": expression.wrt,
        "order": order,
        "inputs": expression.labels,
        "agree": agree,
        "largest_relative_disagreement": disagreement,
        "tolerance": TOLERANCE,
        "notes": [*(f"{name} = {formula[:150]}" for name, formula in forms.items()), _WATCH],
    }
    methods = {name: to_json(each) for name, each in found.items()}
    groups = {"at": to_json(expression.at), "formulas": forms, "methods": methods}
    return GradientResult(
        title=f"{expression.text} at {at}",
        passed=agree,
        verdict=f"the three {'agree' if agree else 'DISAGREE'}: largest relative disagreement "
        f"{disagreement:.1e}, tolerance {TOLERANCE:.0e}",
        table=[
            {"method": name, "value": _text(each["value"]), heading: _text(each["derivative"])}
            for name, each in found.items()
        ],
        document=to_json(facts) | groups,
        graph=graph,
    )


def _differentiate(
    expression: Expression, order: int
) -> tuple[dict[str, dict[str, Array]], Any, Any]:
    """Returns value and derivative by method, the symbolic formulas, and the recorded graph."""
    inputs = len(expression.point)
    expect(
        1 <= order <= MAX_ORDER and inputs**order <= MAX_DERIVATIVES,
        "--order",
        f"1 to {MAX_ORDER}, and at most {MAX_DERIVATIVES} derivatives",
        f"{order} for {inputs} elements of --wrt",
    )
    # TensorFlow and sympy need seconds to import. Mistakes are reported before that.
    from trainer.gradient import methods

    numeric = methods.by_differences(expression, order)
    symbolic_value, symbolic, formulas = methods.by_symbols(expression, order)
    taped_value, taped, graph = methods.by_tape(expression, order)
    # A scalar expression has no axis of outputs, and one scalar variable no axes of inputs.
    outputs = numeric.shape[:1] if expression.value.shape else ()
    shape = outputs + (numeric.shape[1:] if expression.labels != expression.wrt[:1] else ())
    found = {
        "tf.GradientTape": {"value": taped_value, "derivative": taped.reshape(shape)},
        "symbolic (sympy)": {"value": symbolic_value, "derivative": symbolic.reshape(shape)},
        "central differences": {"value": expression.value, "derivative": numeric.reshape(shape)},
    }
    return found, formulas, graph


def _disagreement(expression: Expression, found: dict[str, dict[str, Array]]) -> float:
    """Returns the largest difference of value or derivative, relative to the largest method.

    Results of less than a millionth of the largest number, or 1e-40, are compared with that
    instead: they can consist of the rounding of float64, or of the step of the differences.
    """
    rows = np.array([[*each["value"].flat, *each["derivative"].flat] for each in found.values()])
    nodes = list(ast.walk(expression.tree))
    written: list[Any] = [node.value for node in nodes if isinstance(node, ast.Constant)]
    written += [CONSTANTS.get(node.id, 0.0) for node in nodes if isinstance(node, ast.Name)]
    largest = max(np.max(np.abs(each)) for each in (rows, *expression.at.values(), *written))
    scales = np.maximum(abs(rows).max(0), max(1e-6 * largest, 1e-40))
    return float((np.ptp(rows, 0) / scales).max())  # nan if a result is not finite


def _closed_forms(expression: Expression, formulas: Any) -> dict[str, str]:
    """Returns the formulas by names such as "d2/da dw", if everything is a scalar."""
    import sympy

    if any(array.shape for array in expression.at.values()):
        return {}
    order, forms = formulas.ndim - 1, {}
    # Each mixed derivative once.
    for index in itertools.combinations_with_replacement(range(len(expression.wrt)), order):
        counts = Counter(expression.wrt[i] for i in index)
        below = " ".join(f"d{name}{'' if n == 1 else n}" for name, n in counts.items())
        formula = sympy.sstr(formulas[0, *index], full_prec=False)
        forms[f"d{'' if order == 1 else order}/{below}"] = formula
    return forms


def _text(array: Array) -> str:
    if array.shape == ():
        return f"{float(array):.12g}"
    return np.array2string(array, precision=6, separator=", ", threshold=36, edgeitems=2)
