"""Automatic differentiation: tf.GradientTape, in float64, in a graph that TensorBoard can show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.gradient.expression import Expression, Node

_TENSORFLOW: dict[str, Callable[..., Any]] = {
    "add": tf.add,
    "subtract": tf.subtract,
    "multiply": tf.multiply,
    "divide": tf.divide,
    "power": tf.pow,
    "negative": tf.negative,
    **{name: getattr(tf.math, name) for name in ("exp", "log", "sqrt", "sin", "cos", "tan")},
    **{name: getattr(tf.math, name) for name in ("asin", "acos", "atan", "sinh", "cosh", "tanh")},
    **{name: getattr(tf.math, name) for name in ("abs", "sigmoid", "softplus")},
    "relu": tf.nn.relu,
    "minimum": tf.minimum,
    "maximum": tf.maximum,
    "sum": tf.reduce_sum,
    "mean": tf.reduce_mean,
    "dot": lambda x, y: tf.tensordot(x, y, 1),
    "matmul": lambda x, y: tf.tensordot(x, y, 1),
    "transpose": tf.transpose,
}


@dataclass
class Taped:
    """What the tape says.

    Attributes:
        value: Of the expression, float64.
        derivative: float64 [outputs, inputs] for order 1, [outputs, inputs, inputs] for order 2 and
            so on; inputs are the elements of all variables, one variable after the other.
        unconnected: By variable, the lowest order whose derivative the tape has no path to: there
            GradientTape says None.
        graph: The recorded operations.
    """

    value: NDArray[np.float64]
    derivative: NDArray[np.float64]
    unconnected: dict[str, int]
    graph: Any = field(repr=False)


def derive(expression: Expression, wrt: Sequence[str], order: int) -> Taped:
    """Differentiates an expression at its point.

    Args:
        expression: With a value for every name.
        wrt: Names of the variables.
        order: Of the derivative, from 1.
    """
    names = list(expression.at)
    unconnected: dict[str, int] = {}

    def function(*tensors: Any) -> tuple[Any, Any]:
        at = dict(zip(names, tensors, strict=True))
        return _nested(expression, at, wrt, order, unconnected)

    signature = [tf.TensorSpec(expression.at[name].shape, tf.float64, name=name) for name in names]
    traced = tf.function(function, input_signature=signature).get_concrete_function()
    value, derivative = traced(*(tf.constant(expression.at[name], tf.float64) for name in names))
    return Taped(value.numpy(), derivative.numpy(), unconnected, traced.graph)


def _nested(
    expression: Expression,
    at: Mapping[str, Any],
    wrt: Sequence[str],
    order: int,
    unconnected: dict[str, int],
) -> tuple[Any, Any]:
    """Returns the value and the derivative of an order: a tape around the tape of the one below."""
    with tf.GradientTape() as tape:
        # A tape records variables (tf.Variable) by themselves, and tensors only when told to.
        tape.watch([at[name] for name in wrt])
        if order == 1:
            with tf.name_scope("expression"):
                value = target = evaluate(expression, at)
        else:
            value, target = _nested(expression, at, wrt, order - 1, unconnected)
    with tf.name_scope(f"derivative_{order}"):
        sources = [at[name] for name in wrt]
        one = target.shape.rank == 0
        found = tape.gradient(target, sources) if one else tape.jacobian(target, sources)
        for name, part in zip(wrt, found, strict=True):
            if part is None:
                unconnected.setdefault(name, order)
        # [outputs, inputs, ..., elements of one variable], then all variables beside each other
        lead = [
            value.shape.num_elements(),
            *[sum(s.shape.num_elements() for s in sources)] * (order - 1),
        ]
        parts = [
            tf.zeros([*lead, source.shape.num_elements()], tf.float64)
            if part is None
            else tf.reshape(part, [*lead, source.shape.num_elements()])
            for source, part in zip(sources, found, strict=True)
        ]
        return value, parts[0] if len(parts) == 1 else tf.concat(parts, -1)


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    """Returns the value as a float64 tensor that depends on the tensors of `values`."""

    def walk(node: Node) -> Any:
        if node.number is not None:
            return tf.constant(node.number, tf.float64)
        if node.operation == "name":
            return values[node.name]
        if node.operation == "power" and _small_integer(node.arguments[1].number):
            return _whole_power(walk(node.arguments[0]), int(node.arguments[1].number or 0))
        return _TENSORFLOW[node.operation](*map(walk, node.arguments))

    return walk(expression.root)


def _small_integer(number: int | float | None) -> bool:
    return number is not None and float(number).is_integer() and abs(number) <= 64


def _whole_power(base: Any, exponent: int) -> Any:
    """Multiplies: the third derivative of tf.pow(x, 2.0) at 0 would be 0 * inf."""
    if exponent < 0:
        return 1 / _whole_power(base, -exponent)
    if exponent == 0:
        return tf.ones_like(base)
    if exponent == 1:
        return tf.identity(base)
    square = tf.square(_whole_power(base, exponent // 2))
    return square * base if exponent % 2 else square
