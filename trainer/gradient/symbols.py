"""Symbolic differentiation by sympy, with one scalar symbol for each element."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from trainer.errors import InputError, expect
from trainer.gradient.expression import Array, Expression, Library, element_operations

_DIGITS = 40  # decimal; results are exact after rounding to float64
MAX_PARTS = 5_000  # operations of all formulas; sympy needs seconds for this many


class Sign(sympy.Function):
    """The sign of its argument: -1, 0 or 1, with a derivative of 0 everywhere.

    It replaces sympy's sign, Abs and Max: they have no usable derivative if sympy cannot prove that
    the argument is real, as for abs(log(w)), and a DiracDelta as second derivative.
    """

    @classmethod
    def eval(cls, x: Any) -> Any:
        """Returns the sign of a number, and None for a formula."""
        return sympy.Integer(bool(x > 0) - bool(x < 0)) if x.is_comparable else None

    def fdiff(self, argindex: int = 1) -> Any:  # noqa: ARG002
        """Returns the derivative, which is 0 except at the jump."""
        return sympy.Integer(0)


def _number(value: float) -> Any:
    """Returns an exact number, so that 2 is shown as 2 and 0.1 as 0.1."""
    return sympy.Integer(value) if isinstance(value, int) else sympy.Float(repr(value), _DIGITS)


_LIBRARY = Library(element_operations(sympy, Sign), {"pi": sympy.pi, "e": sympy.E}, _number)


def derive(expression: Expression, order: int) -> tuple[Array, Array, NDArray[Any]]:
    """Differentiates an expression by rules, then inserts the numbers of its point.

    Returns:
        The value of the expression and the derivative, float64; and its formulas, sympy expressions
        [outputs, inputs] with one more axis of inputs for each further order.

    Raises:
        InputError: The formulas are too long, or not finite at the point.
    """
    every = replace(expression, wrt=list(expression.at))
    symbols = np.array([sympy.Symbol(label) for label in every.labels], object)
    exact = [sympy.Float(number, _DIGITS) for number in every.point.tolist()]
    numbers = dict(zip(symbols, exact, strict=True))

    @functools.cache  # a Jacobian can have many equal elements
    def insert(formula: Any) -> float:
        number = sympy.sympify(formula).xreplace(numbers).evalf(_DIGITS)
        if not (number.is_number and number.is_extended_real and number.is_finite):
            raise InputError(
                f"the closed form {sympy.sstr(formula, full_prec=False)[:100]} is not finite at "
                f"this point ({number}): choose another point"
            )
        return float(number)

    to_float = np.vectorize(insert, otypes=[np.float64])
    differentiate = np.frompyfunc(functools.cache(sympy.diff), 2, 1)  # a Hessian is symmetric
    value = np.asarray(every.evaluate(symbols, _LIBRARY), object)
    inputs = [sympy.Symbol(label) for label in expression.labels]
    formulas = value.ravel()
    for _ in range(order):
        parts = sum(1 + sympy.count_ops(formula) for formula in formulas.flat)
        shorter = "choose a shorter expression, fewer elements or a lower --order"
        expect(parts <= MAX_PARTS, "formulas", f"at most {MAX_PARTS} parts", f"{parts}; {shorter}")
        formulas = differentiate.outer(formulas, inputs)
    return to_float(value), to_float(formulas), formulas
