"""`trainer benchmark operations`: common operations and layers, forward and with gradient."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from trainer import devices
from trainer.benchmark import cases
from trainer.benchmark.cases import fastest, select_each
from trainer.benchmark.flops import count_flops
from trainer.benchmark.matmul import product_cases
from trainer.benchmark.result import RATES, BenchmarkResult
from trainer.benchmark.timing import Budget, Measurement

# Dot products that fit each cache, and one that fits none, show the bandwidth.
_DOTS = (10_000, 1_000_000, 10_000_000)
FULL, QUICK = Budget(15, 0.02, 0.3, (1024, 2048), _DOTS), Budget(7, 0.004, 0.05, (1024,), _DOTS)
# A function of tensors, or a layer; and the shapes of its inputs.
Operation = tuple[Callable[..., tf.Tensor], list[tuple[int, ...]]]


def operations(size: str) -> dict[str, Operation]:
    """Returns the operations at a "small" size (an MNIST network, batch 128) or a "large" one."""
    batch, side, inner, width = (128, 12, 16, 128) if size == "small" else (64, 56, 64, 1024)
    image, wide = (batch, side, side, inner), (batch, width)
    steps, units, words = (28, 32, 1000) if size == "small" else (64, 256, 30_000)
    words_in, sequence = (batch, steps), (batch, steps, units)
    labels = tf.one_hot(tf.range(batch) % width, width)
    entropy = functools.partial(tf.nn.softmax_cross_entropy_with_logits, labels)
    return {
        "add": (tf.add, [image, image]),
        "matmul": (tf.matmul, [wide, (width, width)]),
        "conv2d": (layers.Conv2D(inner, 3, padding="same"), [image]),
        "depthwise_conv2d": (layers.DepthwiseConv2D(3, padding="same"), [image]),
        "max_pooling": (layers.MaxPooling2D(), [image]),
        "relu": (tf.nn.relu, [image]),
        "gelu": (tf.nn.gelu, [image]),
        "softmax": (tf.nn.softmax, [wide]),
        "cross_entropy": (entropy, [wide]),
        "batch_normalization": (layers.BatchNormalization(), [image]),
        "layer_normalization": (layers.LayerNormalization(), [wide]),
        "dropout": (layers.Dropout(0.5), [image]),
        "dense": (layers.Dense(width), [wide]),
        "embedding": (layers.Embedding(words, units), [words_in]),
        "lstm": (layers.LSTM(units), [sequence]),
        "attention": (layers.MultiHeadAttention(4, units // 4), [sequence, sequence]),
    }


def benchmark_operations(
    words: list[str] | None, *, quick: bool = False, seed: int = 0
) -> BenchmarkResult:
    """Measures every operation, forward and with gradient, at a small and a large size.

    The arguments are the options of `trainer benchmark operations`; `words` are those of
    `--device`. A quick measurement has only the small size.

    Raises:
        CheckError: A rate is impossible, or a tensor is on another device.
    """
    names, budget = select_each(words), QUICK if quick else FULL
    products = {"dot": ["float32"], "square": ["float32"]}
    found = list(product_cases(names, products, budget, seed=seed))
    for device, size in itertools.product(names, ("small",) if quick else ("small", "large")):
        with tf.device(device):
            made = operations(size)
        for name, passed in itertools.product(made, ("forward", "gradient")):
            row = {"key": f"{name}/{size}/{device}/{passed}", "operation": name}
            row |= {"size": size, "device": device, "pass": passed, "label": passed}
            found.append((row["key"], functools.partial(_prepare, made[name], row, budget, seed)))
    measured, skipped = cases.measure(found, budget, seed=seed)
    return BenchmarkResult(
        name="operations",
        subject=f"operations on {', '.join(names)}",
        rows=[_complete(e, measured) for e in measured if "operation" in e.row],
        columns=("operation", "size", "device", "pass", *RATES),
        settings={"seed": seed, **asdict(budget)},
        devices=names,
        x="operation",
        panel="size",
        skipped=skipped,
    )


def _prepare(
    operation: Operation, row: dict[str, Any], budget: Budget, seed: int
) -> list[Measurement]:
    """Creates the inputs of an operation, checks the device of its results, and warms up."""
    generator, device = np.random.default_rng(seed), row["device"]
    gradient, (made, shapes) = row["pass"] == "gradient", cast("Any", operation)
    is_layer = isinstance(made, keras.Layer)
    function = functools.partial(made, training=True) if is_layer else made
    draw = functools.partial(generator.standard_normal, dtype=np.float32)
    if isinstance(made, layers.Embedding):
        draw = functools.partial(generator.integers, 0, made.input_dim, dtype=np.int32)
    with tf.device(device):
        keras.utils.set_random_seed(seed)
        inputs = [tf.identity(tf.constant(draw(size=shape))) for shape in shapes]
        result = function(*inputs)  # a layer creates its weights now
        weights = [weight.value for weight in made.trainable_variables] if is_layer else []
        compiled: Any = tf.function(_derivative(function, weights) if gradient else function)

    def call() -> Any:
        with tf.device(device):
            return compiled(*inputs)

    for tensor in tf.nest.flatten(call()):
        devices.check_placement([tensor], devices.single(device))
    # None: elementwise operations have no products, and those of a loop (LSTM) are not counted.
    flops = count_flops(compiled.get_concrete_function(*inputs).graph)
    moved = sum(t.dtype.size * math.prod(t.shape) for t in [*inputs, *weights, result])
    # The gradient of a product takes two more products of the same size.
    factor = (2 if flops == 0 else 3) if gradient else 1
    row |= {"flops": flops or None, "bytes": factor * moved}
    return [Measurement(call, cases.synchronize, budget, row)]


def _derivative(
    function: Callable[..., tf.Tensor], weights: list[tf.Tensor]
) -> Callable[..., list[tf.Tensor]]:
    """Returns a function that computes the gradients of all inputs and weights."""

    def derive(*inputs: tf.Tensor) -> list[tf.Tensor]:
        floating = [x for x in inputs if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            # The square makes the incoming gradient depend on the inputs: constants are folded.
            result = tf.reduce_sum(tf.square(function(*inputs)))
        found = tape.gradient(result, [*floating, *weights])
        return [tf.convert_to_tensor(each) for each in found]

    return derive


def _complete(each: Measurement, measured: list[Measurement]) -> dict[str, Any]:
    """Returns a complete row.

    The limit is the peak of arithmetic, or the fastest GB/s for as many bytes times
    the operations for each byte, whichever is lower. Williams, Waterman and Patterson 2009,
    Roofline, Communications of the ACM 52(4).
    """
    device = each.row["device"]
    row = cases.complete_row(each, measured, "flops", device=device, shape="square")
    bandwidth = fastest(measured, "bytes", at_least=row["bytes"], device=device)
    return row | {"share": max(row["share"] or 0.0, row["gbyte_per_s"] / bandwidth)}
