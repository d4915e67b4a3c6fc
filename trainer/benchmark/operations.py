"""`trainer benchmark operations`: common operations and layers, forward and with gradient."""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from trainer.benchmark.checks import check_device, check_share
from trainer.benchmark.devices import select_each
from trainer.benchmark.products import cache_level, cache_levels, fastest, prepare_products
from trainer.benchmark.result import BenchmarkResult, skipped_gpus, time_text
from trainer.benchmark.timing import Budget, Measurement, run_interleaved
from trainer.environment import describe_environment

_logger = logging.getLogger(__name__)

# Dot products that fit each cache, and one that fits none, show the bandwidth.
_DOTS = (10_000, 1_000_000, 10_000_000)
FULL, QUICK = Budget(15, 0.02, 0.3, (1024, 2048), _DOTS), Budget(7, 0.004, 0.05, (1024,), _DOTS)
_SIZES = ("small", "large")
# The gradient of a matrix product takes two more products of the same size.
_PRODUCTS = ("matmul", "conv2d", "depthwise_conv2d", "dense", "lstm", "attention")


class Operation(NamedTuple):
    """An operation at one size."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # of its inputs
    make: Callable[[], Callable[..., tf.Tensor]]  # returns a function of the inputs, or a layer
    flops: float  # multiplications and additions of the forward pass
    integers: int = 0  # inputs are integers below this; 0: random normal numbers
    training: bool = False  # whether to call the layer with training=True


def operations(size: str) -> list[Operation]:
    """Returns the operations at the size of an MNIST network with batch 128, or a large one.

    Args:
        size: "small" or "large".
    """
    batch, side, inner, width = (128, 12, 16, 128) if size == "small" else (64, 56, 64, 1024)
    image, wide = (batch, side, side, inner), (batch, width)
    pixels, elements, wide_elements = batch * side**2, batch * side**2 * inner, batch * width
    steps, units, words = (28, 32, 1000) if size == "small" else (64, 256, 30_000)
    words_in, sequence = (batch, steps), (batch, steps, units)
    layers, nn = keras.layers, tf.nn
    labels = tf.one_hot(tf.range(batch) % width, width)
    conv, depthwise = (
        lambda: layers.Conv2D(inner, 3, padding="same"),
        lambda: layers.DepthwiseConv2D(3, padding="same"),
    )
    entropy = functools.partial(nn.softmax_cross_entropy_with_logits, labels)
    norm, scale = layers.BatchNormalization, layers.LayerNormalization
    attention = lambda: layers.MultiHeadAttention(4, units // 4)  # noqa: E731
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
        Operation(
            *("attention", (sequence, sequence), attention),
            flops=2 * batch * steps * (4 * units**2 + 2 * steps * units),
        ),
    ]


def benchmark_operations(
    words: list[str], *, quick: bool = False, seed: int = 0
) -> BenchmarkResult:
    """Measures every operation, forward and with gradient, at a small and a large size.

    Args:
        words: Devices, see `trainer.benchmark.devices.select_each`.
        quick: Measure less, and only the small size.
        seed: Random seed for inputs, weights and order.

    Raises:
        InputError: A device is unknown.
        MissingError: A device is not available.
        CheckError: A rate is impossible, or a tensor is on another device.
    """
    names, budget = select_each(words), QUICK if quick else FULL
    products = prepare_products(names, ["dot", "square"], ["float32"], budget, seed=seed)
    entries: list[Measurement] = []
    for device, size in itertools.product(names, _SIZES[:1] if quick else _SIZES):
        _logger.info("preparing %s operations on %s", size, device)
        for operation, gradient in itertools.product(operations(size), (False, True)):
            row = {"operation": operation.name, "size": size, "device": device}
            entries.append(_prepare(operation, row | {"gradient": gradient}, budget, seed))
    run_interleaved([*entries, *products.baselines], blocks=budget.blocks, seed=seed)
    peaks = {name: _peaks(name, entries, products.baselines) for name in names}
    rows = [_complete(entry, peaks[entry.row["device"]]) for entry in entries]
    skipped = {"large": "--quick measures only small operations"} if quick else {}
    return BenchmarkResult(
        name="operations",
        subject=f"operations on {', '.join(names)}",
        rows=rows,
        columns=_COLUMNS,
        skipped=products.skipped | skipped_gpus(names) | skipped,
        settings={"seed": seed, "devices": names, **asdict(budget)},
        environment=describe_environment(tuple(names), fingerprint=""),
        facts={"peaks": peaks},
        baselines=products.baselines,
        figure=_roofline(rows, peaks),
    )


def _prepare(operation: Operation, row: dict[str, Any], budget: Budget, seed: int) -> Measurement:
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

    key = f"{operation.name}/{row['size']}/{device}/{'gradient' if gradient else 'forward'}"
    for tensor in tf.nest.flatten(call()):
        check_device(tensor, device, key)
    factor = (3 if operation.name in _PRODUCTS else 2) if gradient else 1
    moved = sum(t.dtype.size * math.prod(t.shape) for t in [*inputs, *weights, result])
    row |= {"key": key, "inputs": [list(shape) for shape in operation.shapes]}
    row |= {"flops": factor * operation.flops, "bytes": factor * moved}
    row["fits"] = cache_level(row["bytes"], device)
    return Measurement(call, tf.test.experimental.sync_devices, budget, row)


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


def _peaks(
    device: str, entries: list[Measurement], baselines: list[Measurement]
) -> dict[str, float]:
    """Returns the fastest block of a device: GFLOP/s, and GB/s from each cache and from memory.

    Raises:
        CheckError: An operation is far faster than the products of the same run.
    """
    peak = fastest(baselines, "flops", shape=["square"], device=[device])
    for entry in entries:
        if entry.row["device"] == device:
            check_share(entry.row["flops"] / entry.median / 1e9, peak, entry.row["key"])
    levels = cache_levels()
    rates = {}
    for i, level in enumerate(levels):
        same = {"device": [device], "fits": levels[i:]}  # no cache is slower than a larger one
        dots = fastest(baselines, "bytes", shape=["dot"], **same)
        rates[level] = max(dots, fastest(entries, "bytes", **same))
    return {"gflop_per_s": max(peak, fastest(entries, "flops", device=[device])), **rates}


def _complete(entry: Measurement, peaks: dict[str, float]) -> dict[str, Any]:
    """Adds timing, rates and the share of the roofline to a row."""
    row = entry.complete_row()
    row["best_seconds"] = min(entry.block_seconds)
    # An embedding has no arithmetic; only its memory traffic counts.
    row["share"] = row["gbyte_per_s"] / peaks[row["fits"]]
    if row["flops"]:
        allowed = peaks[row["fits"]] * row["flops"] / row["bytes"]
        row["share"] = row["gflop_per_s"] / min(peaks["gflop_per_s"], allowed)
    return row


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "operation": lambda row: str(row["operation"]),
    "size": lambda row: str(row["size"]),
    "device": lambda row: str(row["device"]),
    "pass": lambda row: "gradient" if row["gradient"] else "forward",
    "time": lambda row: time_text(row["seconds"]),
    "GFLOP/s": lambda row: f"{row['gflop_per_s']:.3g}" if row["flops"] else "",
    "share": lambda row: f"{row['share']:.1%}",
    "stable": lambda row: "yes" if row["timing"]["stable"] else "no",
}


def _roofline(rows: list[dict[str, Any]], peaks: dict[str, dict[str, float]]) -> Figure:
    """Draws GFLOP/s against operations per byte, below the limits of each device.

    Williams, Waterman and Patterson 2009, Communications of the ACM 52(4).
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes, largest = figure.subplots(), rows[-1]["size"]
    rows = [row | {"x": row["flops"] / row["bytes"]} for row in rows if row["flops"]]
    intensities = [row["x"] for row in rows]
    line = np.geomspace(min(intensities) / 2, max(intensities) * 2, 100)
    for number, (device, limits) in enumerate(peaks.items()):
        top = limits["gflop_per_s"]
        levels = [level for level in reversed(limits) if level != "gflop_per_s"]
        for level, style in zip(levels, ("-", "--", "-.", ":"), strict=False):
            label = f"{device}: {top:.0f} GFLOP/s, {level} {limits[level]:.0f} GB/s"
            roof = np.minimum(top, limits[level] * line)
            axes.loglog(line, roof, style, color=f"C{number}", label=label)
        for row in (row for row in rows if row["device"] == device):
            place, named = (row["x"], row["gflop_per_s"]), row["size"] == largest
            fill = "none" if row["gradient"] else f"C{number}"
            marker = "o" if named else "."
            axes.plot(*place, marker, color=f"C{number}", markerfacecolor=fill)
            if named and not row["gradient"]:
                axes.text(*place, f"  {row['operation']}", fontsize=8, va="top")
    title = f"roofline: circles are {largest} operations (hollow: with gradient)"
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s", title=title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9)
    return figure
