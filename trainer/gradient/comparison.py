"""Compares the derivative of an expression by three methods."""

import ast
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import InputError, expect
from trainer.gradient.expression import CONSTANTS, Expression, parse, parse_values

DEFAULT_EXPRESSION, DEFAULT_AT, DEFAULT_WRT = "a*w**2 + b*w + c", "a=1,b=2,c=3,w=4", "w"
MAX_DERIVATIVES = 256  # each by three methods
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
        at: The value of each name: "a=1,b=-0.5".
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
    facts = {
        "expression": expression.text,
        "wrt": expression.wrt,
        "order": order,
        "agree": agree,
        "largest_relative_disagreement": disagreement,
        "tolerance": TOLERANCE,
        "notes": [*(f"{name} = {formula[:150]}" for name, formula in formulas.items()), _WATCH],
    }
    methods = {method: to_json(numbers) for method, numbers in found.items()}
    return GradientResult(
        title=f"{expression.text} at {at}",
        passed=agree,
        verdict=f"the three {'agree' if agree else 'DISAGREE'}: largest relative disagreement "
        f"{disagreement:.1e}, tolerance {TOLERANCE:.0e}",
        table=[
            {"method": method, **{name: f"{number:.12g}" for name, number in numbers.items()}}
            for method, numbers in found.items()
        ],
        document=to_json(facts) | {"at": expression.at, "formulas": formulas, "methods": methods},
        graph=graph,
    )


def _differentiate(
    expression: Expression, order: int
) -> tuple[dict[str, dict[str, float]], dict[str, str], Any]:
    """Returns value and derivatives by method, the symbolic formulas, and the recorded graph."""
    inputs = len(expression.wrt)
    expect(
        1 <= order <= MAX_ORDER and inputs**order <= MAX_DERIVATIVES,
        "--order",
        f"1 to {MAX_ORDER}, and at most {MAX_DERIVATIVES} derivatives",
        f"{order} for {inputs} variables",
    )
    # TensorFlow and sympy need seconds to import. Mistakes are reported before that.
    from trainer.gradient import methods

    numeric = methods.by_differences(expression, order)
    symbolic_value, symbolic, formulas = methods.by_symbols(expression, order)
    taped_value, taped, graph = methods.by_tape(expression, order)
    names = list(map(_derivative_name, expression.derivatives(order)))
    results = {
        "tf.GradientTape": (taped_value, taped),
        "symbolic (sympy)": (symbolic_value, symbolic),
        "central differences": (expression.value, numeric),
    }
    found = {
        method: {"value": value, **dict(zip(names, derivatives, strict=True))}
        for method, (value, derivatives) in results.items()
    }
    return found, dict(zip(names, formulas, strict=True)), graph


def _disagreement(expression: Expression, found: dict[str, dict[str, float]]) -> float:
    """Returns the largest difference of value or derivative, relative to the largest method.

    Results of less than a millionth of the largest number, or 1e-40, are compared with that
    instead: they can consist of the rounding of float64, or of the step of the differences.
    """
    rows = np.array([list(numbers.values()) for numbers in found.values()])
    nodes = list(ast.walk(expression.tree))
    written: list[Any] = [node.value for node in nodes if isinstance(node, ast.Constant)]
    written += [CONSTANTS.get(node.id, 0.0) for node in nodes if isinstance(node, ast.Name)]
    largest = np.abs([*rows.flat, *expression.at.values(), *written]).max()
    scales = np.maximum(abs(rows).max(0), max(1e-6 * largest, 1e-40))
    return float((np.ptp(rows, 0) / scales).max())  # nan if a result is not finite


def _derivative_name(variables: tuple[str, ...]) -> str:
    """Returns a name such as "d2/da dw"."""
    below = [f"d{name}{'' if n == 1 else n}" for name, n in Counter(variables).items()]
    order = "" if len(variables) == 1 else len(variables)
    return f"d{order}/{' '.join(below)}"
