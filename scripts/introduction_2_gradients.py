"""Automatic gradients: what a tape does, and what it is for.

    python scripts/introduction_2_gradients.py

Second of three; `trainer gradient` differentiates any expression in three ways.
"""

import tensorflow as tf

from trainer.gradient.comparison import derive


def slope(a: float, b: float, c: float, w: float) -> float:
    """Returns d/dw of a w^2 + b w + c, which is 2 a w + b, without being told so."""
    at = tf.constant(w)
    with tf.GradientTape() as tape:
        tape.watch(at)  # a tf.Variable is watched by itself
        value = a * at**2 + b * at + c  # the tape records each operation
    return float(tape.gradient(value, at))  # and is read backwards, by the chain rule


def fit_line(steps: int = 200, learning_rate: float = 0.1) -> tuple[float, float]:
    """Finds weight and bias of y = 3 x - 1 from points alone: training is nothing else."""
    x = tf.linspace(-1.0, 1.0, 21)
    y = 3 * x - 1
    weight, bias = tf.Variable(0.0), tf.Variable(0.0)
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((weight * x + bias - y) ** 2)
        for variable, gradient in zip(
            (weight, bias), tape.gradient(loss, (weight, bias)), strict=True
        ):
            variable.assign_sub(learning_rate * gradient)
    return float(weight), float(bias)


def main() -> None:
    """Prints one derivative by three methods, and the line that gradients found."""
    print(f"GradientTape: d/dw of w^2 + 2 w + 3 at w = 4 is {slope(1.0, 2.0, 3.0, 4.0):g}")
    result = derive("a*w**2 + b*w + c", at="a=1,b=2,c=3,w=4", wrt="w")
    for name, found in result.document["methods"].items():
        print(f"{name:>20}: {found['d/dw']:.12g}")
    print(result.verdict)
    weight, bias = fit_line()
    print(f"a line through points of y = 3 x - 1, by 200 steps: y = {weight:.3f} x {bias:+.3f}")


if __name__ == "__main__":
    main()
