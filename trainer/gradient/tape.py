"""Automatic differentiation by tf.GradientTape, in float64, in a graph that TensorBoard shows."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.gradient.expression import CONSTANTS, ELEMENTARY, OPERATORS, Array, Expression, Library


def _power(base: Any, exponent: Any) -> Any:
    """Multiplies if the exponent is 0 to 4: the third derivative of tf.pow(x, 2.0) at 0 is nan."""
    if isinstance(exponent, np.floating) and exponent in range(5):
        return functools.reduce(tf.multiply, [base] * int(exponent), tf.ones_like(base))
    return tf.pow(base, exponent)


_NAMES = (*ELEMENTARY, "abs", "sigmoid", "softplus", "minimum", "maximum")
_OPERATIONS = {
    **OPERATORS,
    **{name: getattr(tf.math, name) for name in _NAMES},
    **dict.fromkeys(("@", "dot", "matmul"), functools.partial(tf.tensordot, axes=1)),
    "**": _power,
    "relu": tf.nn.relu,
    "sum": tf.reduce_sum,
    "mean": tf.reduce_mean,
    "transpose": tf.transpose,
}
_LIBRARY = Library(_OPERATIONS, CONSTANTS, np.float64, tf.reshape)


def derive(expression: Expression, order: int) -> tuple[Array, Array, Any]:
    """Differentiates an expression at its point.

    Returns:
        The value of the expression and the derivative, float64 [outputs, inputs] with one more axis
        of inputs for each further order; and the recorded tf.Graph.
    """

    def differentiate(x: Any, level: int) -> tuple[Any, Any]:
        """Returns value and derivative by all elements, with one tape around another."""
        if level == 0:
            with tf.name_scope("expression"):
                value = expression.evaluate(x, _LIBRARY)
                return value, tf.reshape(value, [-1])
        with tf.GradientTape() as tape:
            tape.watch(x)  # a tape records a tensor, unlike a tf.Variable, only if it watches it
            value, target = differentiate(x, level - 1)
        with tf.name_scope(f"derivative_{level}"):
            return value, tape.jacobian(target, x, unconnected_gradients="zero")

    point = tf.constant(expression.point)
    traced = tf.function(lambda x: differentiate(x, order), autograph=False).get_concrete_function(
        tf.TensorSpec.from_tensor(point, name="_".join(expression.wrt))
    )
    value, derivative = (np.array(tensor) for tensor in traced(point))
    return value, derivative, traced.graph
