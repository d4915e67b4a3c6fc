"""`trainer benchmark operations`: common operations and layers, forward and with gradient."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from trainer.benchmark import cases
from trainer.benchmark.cases import Case, baselines_of
from trainer.benchmark.devices import select_each
from trainer.benchmark.products import fastest, product_cases
from trainer.benchmark.result import BenchmarkResult, Columns, spread_text, time_text
from trainer.benchmark.timing import Budget, Measurement

# Dot products that fit each cache, and one that fits none, show the bandwidth.
_DOTS = (10_000, 1_000_000, 10_000_000)
FULL, QUICK = Budget(15, 0.02, 0.3, (1024, 2048), _DOTS), Budget(7, 0.004, 0.05, (1024,), _DOTS)
_SIZES = ("small", "large")
# The gradient of a matrix product takes two more products of the same size.
_PRODUCTS = ("matmul", "conv2d", "depthwise_conv2d", "dense", "lstm", "attention")
_COLUMNS: Columns = {
    "operation": ("operation", ""),
    "size": ("size", ""),
    "device": ("device", ""),
    "pass": ("pass", ""),
    "time": ("seconds", time_text),
    "IQR": ("timing", spread_text),
    "GFLOP/s": ("gflop_per_s", ".3g"),
    "GB/s": ("gbyte_per_s", ".3g"),
    "share": ("share", ".1%"),
}


class Operation(NamedTuple):
    """An operation at one size."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # of its inputs
    make: Callable[[], Callable[..., tf.Tensor]]  # returns a function of the inputs, or a layer
    flops: float  # multiplications and additions of the forward pass
    integers: int = 0  # inputs are integers below this; 0: random normal numbers
    training: bool = False  # whether to call the layer with training=True


def operations(size: str) -> list[Operation]:
    """Returns the operations at a "small" size (an MNIST network, batch 128) or a "large" one."""
    batch, side, inner, width = (128, 12, 16, 128) if size == "small" else (64, 56, 64, 1024)
    image, wide = (batch, side, side, inner), (batch, width)
    pixels, elements, wide_elements = batch * side**2, batch * side**2 * inner, batch * width
    steps, units, words = (28, 32, 1000) if size == "small" else (64, 256, 30_000)
    words_in, sequence = (batch, steps), (batch, steps, units)
    layers, nn, partial = keras.layers, tf.nn, functools.partial
    labels = tf.one_hot(tf.range(batch) % width, width)
    conv = partial(layers.Conv2D, inner, 3, padding="same")
    depthwise = partial(layers.DepthwiseConv2D, 3, padding="same")
    entropy = partial(nn.softmax_cross_entropy_with_logits, labels)
    norm, scale = layers.BatchNormalization, layers.LayerNormalization
    attention = partial(layers.MultiHeadAttention, 4, units // 4)
    attended = 2 * batch * steps * (4 * units**2 + 2 * steps * units)
    return [
        Operation("add", (image, image), lambda: tf.add, elements),
        Operation("matmul", (wide, (width, width)), lambda: tf.matmul, 2 * batch * width**2),
        Operation("conv2d", (image,), conv, 2 * 9 * pixels * inner**2),
        Operation("depthwise_conv2d", (image,), depthwise, 2 * 9 * elements),
        Operation("max_pooling", (image,), layers.MaxPooling2D, elements),
        Operation("relu", (image,), lambda: nn.relu, elements),
        Operation("gelu", (image,), lambda: nn.gelu, 8 * elements),
        Operation("softmax", (wide,), lambda: nn.softmax, 5 * wide_elements),
        Operation("cross_entropy", (wide,), lambda: entropy, 6 * wide_elements),
        Operation("batch_normalization", (image,), norm, 8 * elements, training=True),
        Operation("layer_normalization", (wide,), scale, 8 * wide_elements),
        Operation("dropout", (image,), lambda: layers.Dropout(0.5), 2 * elements, training=True),
        Operation("dense", (wide,), lambda: layers.Dense(width), 2 * batch * width**2),
        Operation("embedding", (words_in,), lambda: layers.Embedding(words, units), 0, words),
        Operation("lstm", (sequence,), lambda: layers.LSTM(units), 16 * batch * steps * units**2),
        Operation("attention", (sequence, sequence), attention, attended),
    ]


def benchmark_operations(
    words: list[str], *, quick: bool = False, seed: int = 0
) -> BenchmarkResult:
    """Measures every operation, forward and with gradient, at a small and a large size.

    The arguments are the options of `trainer benchmark operations`; `words` are those of
    `--device`. A quick measurement has only the small size.

    Raises:
        InputError: A device is unknown.
        MissingError: A device is not available.
        CheckError: A rate is impossible, or a tensor is on another device.
    """
    names, budget = select_each(words), QUICK if quick else FULL
    products = product_cases(names, ["dot", "square"], ["float32"], budget, seed=seed)
    own = _operation_cases(names, _SIZES[:1] if quick else _SIZES, budget, seed)
    measured, skipped = cases.measure([*products, *own], budget, seed=seed)
    rows = [_complete(each, measured) for each in measured if "operation" in each.row]
    if quick:
        skipped["large"] = "--quick measures only small operations"
    return BenchmarkResult(
        name="operations",
        subject=f"operations on {', '.join(names)}",
        rows=rows,
        columns=_COLUMNS,
        skipped=skipped,
        settings={"seed": seed, **asdict(budget)},
        devices=names,
        facts={"peaks": {name: fastest(measured, "flops", device=name) for name in names}},
        baselines=baselines_of(measured),
        figure=_figure(rows),
    )


def _operation_cases(
    devices: list[str], sizes: tuple[str, ...], budget: Budget, seed: int
) -> Iterator[Case]:
    for device, size in itertools.product(devices, sizes):
        for operation, passed in itertools.product(operations(size), ("forward", "gradient")):
            key = f"{operation.name}/{size}/{device}/{passed}"
            row = {"key": key, "operation": operation.name, "size": size, "device": device}
            row |= {"pass": passed, "gradient": passed == "gradient"}
            yield Case(key, functools.partial(_prepare, operation, row, budget, seed))


def _prepare(
    operation: Operation, row: dict[str, Any], budget: Budget, seed: int
) -> list[Measurement]:
    """Creates an operation on a device, checks the device of its results, and warms up."""
    generator, device, gradient = np.random.default_rng(seed), row["device"], row["gradient"]
    with tf.device(device):
        keras.utils.set_random_seed(seed)
        drawn = [
            generator.integers(0, operation.integers, shape, np.int32)
            if operation.integers
            else generator.standard_normal(shape, np.float32)
            for shape in operation.shapes
        ]
        inputs = [tf.identity(tf.constant(array)) for array in drawn]
        made = operation.make()
        function = functools.partial(made, training=True) if operation.training else made
        result = function(*inputs)  # a layer creates its weights now
        variables = made.trainable_variables if isinstance(made, keras.Layer) else []
        weights = [weight.value for weight in variables]
        compiled = tf.function(_derivative(function, weights) if gradient else function)

    def call() -> Any:
        with tf.device(device):
            return compiled(*inputs)

    for tensor in tf.nest.flatten(call()):
        cases.check_device(tensor, device, row["key"])
    factor = (3 if operation.name in _PRODUCTS else 2) if gradient else 1
    moved = sum(t.dtype.size * math.prod(t.shape) for t in [*inputs, *weights, result])
    row["inputs"] = [list(shape) for shape in operation.shapes]
    row |= {"flops": factor * operation.flops, "bytes": factor * moved}
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
    """Adds timing, rates and the share of the limit to a row.

    The limit is the peak of arithmetic, or the fastest GB/s for as many bytes times
    the operations for each byte, whichever is lower. Williams, Waterman and Patterson 2009,
    Roofline, Communications of the ACM 52(4).

    Raises:
        CheckError: The operation is far faster than the products of the same run.
    """
    row, device = each.complete_row(), each.row["device"]
    limit = fastest(baselines_of(measured), "flops", device=device)
    cases.check_share(row["gflop_per_s"], limit, row["key"])
    bandwidth = fastest(measured, "bytes", at_least=row["bytes"], device=device)
    peak = fastest(measured, "flops", device=device)
    row["share"] = max(row["gbyte_per_s"] / bandwidth, row["gflop_per_s"] / peak)
    return row


def _figure(rows: list[dict[str, Any]]) -> Figure:
    """Draws the time of each operation, one panel for each size, one colour for each device."""
    sizes, devices = (list(dict.fromkeys(r[key] for r in rows)) for key in ("size", "device"))
    figure = Figure(figsize=(7 * len(sizes), 6.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for device, passed in itertools.product(devices, ("forward", "gradient")):
            wanted = (size, device, passed)
            shown = [r for r in rows if (r["size"], r["device"], r["pass"]) == wanted]
            axes.semilogx(
                [row["seconds"] for row in shown],
                [row["operation"] for row in shown],
                "o" if passed == "forward" else "x",
                color=f"C{devices.index(device)}",
                label=f"{device} {passed}",
            )
        axes.set(xlabel="seconds: median", title=f"{size} operations")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=9)
        axes.invert_yaxis()
    return figure
