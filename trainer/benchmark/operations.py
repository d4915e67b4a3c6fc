"""The common operations and layers of neural networks, forward and with their gradient."""

import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer import devices as places
from trainer import environment
from trainer.benchmark import checks, matmul, reference
from trainer.benchmark.matmul import Effort, Measurements
from trainer.benchmark.results import Result, skipped_gpus, time_text
from trainer.benchmark.timing import Measurement, take_turns
from trainer.environment import describe_environment

_logger = logging.getLogger(__name__)

# What the peak is measured by: squares for arithmetic, dots (and sums of them) for memory.
_DOTS = (10_000, 1_000_000, 10_000_000)  # of which some fit each cache, and the last none
_PEAK_FULL = Effort(_DOTS, (1024, 2048), blocks=15, block_seconds=0.02, warm_up_seconds=0.3)
_PEAK_QUICK = Effort(_DOTS, (1024,), blocks=7, block_seconds=0.004, warm_up_seconds=0.05)
_SIZES = ("small", "large")


@dataclass(frozen=True)
class Operation:
    """An operation at one size.

    Attributes:
        name: Of the operation.
        shapes: Of its inputs, random normal; integers where `integers` says so.
        make: Makes the function of these inputs; a Keras layer is one.
        flops: Multiplications and additions of the forward pass.
        integers: Inputs are whole numbers below this; 0 for random normal ones.
        training: Whether the layer behaves differently in training, which is then measured.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[], Callable[..., tf.Tensor]]
    flops: float
    integers: int = 0
    training: bool = False

    @property
    def products(self) -> bool:
        """Whether it is made of matrix products: its gradient then takes two more of each."""
        return self.name in ("matmul", "conv2d", "depthwise_conv2d", "dense", "lstm", "attention")


def operations(size: str) -> list[Operation]:
    """Returns the operations at the size of this project's networks, or at a large one.

    Args:
        size: "small" (a batch of 128, as MNIST networks have them) or "large".
    """
    batch, side, inner, width = (128, 12, 16, 128) if size == "small" else (64, 56, 64, 1024)
    image, wide = (batch, side, side, inner), (batch, width)
    pixels, elements = batch * side * side, batch * side * side * inner
    steps, units, words = (28, 32, 1000) if size == "small" else (64, 256, 30_000)
    layers, ops = keras.layers, tf
    labels = tf.one_hot(tf.range(batch) % width, width)
    return [
        Operation("add", (image, image), lambda: ops.add, elements),
        Operation("matmul", (wide, (width, width)), lambda: ops.matmul, 2 * batch * width**2),
        Operation(
            *("conv2d", (image,), lambda: layers.Conv2D(inner, 3, padding="same")),
            flops=2 * 9 * pixels * inner**2,
        ),
        Operation(
            *("depthwise_conv2d", (image,), lambda: layers.DepthwiseConv2D(3, padding="same")),
            flops=2 * 9 * elements,
        ),
        Operation("max_pooling", (image,), lambda: layers.MaxPooling2D(), elements),
        Operation("relu", (image,), lambda: ops.nn.relu, elements),
        Operation("gelu", (image,), lambda: ops.nn.gelu, 8 * elements),
        Operation("softmax", (wide,), lambda: ops.nn.softmax, 5 * batch * width),
        Operation(
            *("cross_entropy", (wide,)),
            lambda: lambda x: ops.nn.softmax_cross_entropy_with_logits(labels, x),
            flops=6 * batch * width,
        ),
        Operation(
            *("batch_normalization", (image,), layers.BatchNormalization, 8 * elements),
            training=True,
        ),
        Operation("layer_normalization", (wide,), layers.LayerNormalization, 8 * batch * width),
        Operation(*("dropout", (image,), lambda: layers.Dropout(0.5), 2 * elements), training=True),
        Operation("dense", (wide,), lambda: layers.Dense(width), 2 * batch * width**2),
        Operation(
            *("embedding", ((batch, steps),), lambda: layers.Embedding(words, units), 0.0),
            integers=words,
        ),
        Operation(
            *("lstm", ((batch, steps, units),), lambda: layers.LSTM(units)),
            flops=2 * batch * steps * 8 * units**2,
        ),
        Operation(
            *("attention", ((batch, steps, units),) * 2),
            lambda: layers.MultiHeadAttention(4, units // 4),
            flops=2 * batch * steps * (4 * units**2 + 2 * steps * units),
        ),
    ]


def benchmark_operations(words: list[str], *, quick: bool = False, seed: int = 0) -> Result:
    """Measures every operation, forward and with its gradient, at a small and a large size.

    Args:
        words: Devices, as `trainer.devices.select_each` takes them.
        quick: Measure less, and only the small size.
        seed: Of the inputs, the weights and the order.

    Raises:
        InputError: A word is unknown.
        MissingError: A device is not here.
        CheckError: A result is elsewhere, or a rate beyond what the device can do.
    """
    names = places.select_each(words)
    effort = _PEAK_QUICK if quick else _PEAK_FULL
    found = matmul.prepare(names, ["dot", "square"], ["float32"], effort, seed=seed)
    rows: list[dict[str, Any]] = []
    measured: list[Measurement] = []
    sizes = _SIZES[:1] if quick else _SIZES
    for device, size in itertools.product(names, sizes):
        _logger.info("preparing %s operations on %s", size, device)
        for operation in operations(size):
            for gradient in (False, True):
                row, measurement = _prepare(operation, size, device, effort, gradient, seed)
                rows.append(row)
                measured.append(measurement)
    _logger.info("measuring: %d blocks of each, in turns", effort.blocks)
    # The references among them: what the machine can do changes with what else it does.
    take_turns([*measured, *found.all_references()], blocks=effort.blocks, seed=seed)
    for row, measurement in zip(rows, measured, strict=True):
        _complete(row, measurement)
    large = {"large": "left out by --quick"} if quick else {}
    most = {name: _most(name, found, rows) for name in names}
    for row in rows:
        row["share"] = _share(row, most[row["device"]])
    return Result(
        name="operations",
        subject=f"operations on {', '.join(names)}",
        rows=rows,
        table=[_shown(row) for row in rows],
        skipped=found.skipped | skipped_gpus(names) | large,
        settings={"seed": seed, "devices": names, **asdict(effort)},
        environment=describe_environment(tuple(names), fingerprint=""),
        notes=[
            "share: of what arithmetic and memory allow for an operation that does so much of "
            "both (the roofline: the peak, or the bandwidth of the cache it fits times the "
            "operations for each byte)"
        ],
        facts={"peaks": most},
        references=found.reference_facts(),
        figures={"roofline": _roofline(rows, most)},
    )


def _prepare(
    operation: Operation, size: str, device: str, effort: Effort, gradient: bool, seed: int
) -> tuple[dict[str, Any], Measurement]:
    """Makes an operation on a device, looks where its result lives, and warms up."""
    generator = np.random.default_rng(seed)
    with tf.device(device):
        keras.utils.set_random_seed(seed)
        drawn = [_draw(operation, shape, generator) for shape in operation.shapes]
        inputs = [tf.identity(tf.constant(array)) for array in drawn]
        made = operation.make()
        function = functools.partial(made, training=True) if operation.training else made
        result = function(*inputs)  # a layer makes its weights now
        layers = [made] if isinstance(made, keras.Layer) else []
        weights = [weight.value for layer in layers for weight in layer.trainable_variables]
        call = _compiled(function, weights, gradient=gradient)
        measurement = effort.start(
            lambda: _on(device, call, inputs), tf.test.experimental.sync_devices
        )
        answers = tf.nest.flatten(_on(device, call, inputs))
    key = f"{operation.name}/{size}/{device}/{'gradient' if gradient else 'forward'}"
    for answer in answers:
        checks.check_device(answer, device, key)
    moved = sum(t.dtype.size * math.prod(t.shape) for t in [*inputs, *weights, result])
    factor = (3 if operation.products else 2) if gradient else 1
    row = {
        "key": key,
        "operation": operation.name,
        "size": size,
        "device": device,
        "gradient": gradient,
        "inputs": [list(shape) for shape in operation.shapes],
        "flops": factor * operation.flops,
        "bytes": factor * moved,
    }
    return row, measurement


def _draw(operation: Operation, shape: tuple[int, ...], generator: Any) -> NDArray[Any]:
    if operation.integers:
        drawn: NDArray[Any] = generator.integers(0, operation.integers, shape, dtype=np.int32)
        return drawn
    normal: NDArray[Any] = generator.standard_normal(shape, dtype=np.float32)
    return normal


def _compiled(function: Callable[..., tf.Tensor], weights: list[Any], *, gradient: bool) -> Any:
    """Returns the function as a graph: its result, or the gradients of all that flows into it."""
    if not gradient:
        return tf.function(function)

    @tf.function
    def derive(*inputs: tf.Tensor) -> list[tf.Tensor]:
        floating = [x for x in inputs if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            # Squared: the gradient that flows back is no constant that could be folded away.
            result = tf.reduce_sum(tf.square(function(*inputs)))
        found = tape.gradient(result, [*floating, *weights])
        return [tf.convert_to_tensor(each) for each in found]

    return derive


def _on(device: str, call: Any, inputs: list[tf.Tensor]) -> Any:
    with tf.device(device):
        return call(*inputs)


def _complete(row: dict[str, Any], measurement: Measurement) -> None:
    """Adds what was measured."""
    timing = measurement.timing()
    row |= {
        "seconds": timing.median,
        "best_seconds": min(timing.block_seconds),
        "gflop_per_s": row["flops"] / timing.median / 1e9,
        "gbyte_per_s": row["bytes"] / timing.median / 1e9,
        "fits": reference.cache_of(row["bytes"], row["device"]),
        "timing": timing.facts(),
    }


def _most(device: str, found: Measurements, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the best block of a device: GFLOP/s, and GB/s from each cache and from memory.

    Raises:
        CheckError: An operation is far beyond the products that were measured beside it.
    """
    levels = [*environment.cpu_caches(), "memory"]
    bytes_: dict[str, list[float]] = {level: [0.0] for level in levels}
    for case, references in found.references.items():
        if (case.device, case.shape) == (device, "dot"):
            best = min(s for r in references.values() for s in r.timing().block_seconds)
            bytes_[reference.cache_of(case.bytes, device)].append(case.bytes / best / 1e9)
    peak = found.peak(device, "float32")
    for row in rows:
        if row["device"] == device:
            checks.check_share(row["gflop_per_s"], peak, row["key"])
            bytes_[row["fits"]].append(row["bytes"] / row["best_seconds"] / 1e9)
    own = [row["flops"] / row["best_seconds"] / 1e9 for row in rows if row["device"] == device]
    # A cache is no slower than the next larger one.
    rates = {level: max(map(max, list(bytes_.values())[i:])) for i, level in enumerate(levels)}
    return {"gflop_per_s": max([peak, *own]), **rates}


def _share(row: dict[str, Any], most: dict[str, float]) -> float:
    """Returns the share of the roofline: of the peak, or of what the bytes leave room for."""
    if not row["flops"]:  # an embedding only moves numbers
        return float(row["gbyte_per_s"] / most[row["fits"]])
    allowed = min(most["gflop_per_s"], most[row["fits"]] * row["flops"] / row["bytes"])
    return float(row["gflop_per_s"] / allowed)


def _levels(peaks: dict[str, float]) -> list[str]:
    """Returns the caches and memory, the slowest first."""
    return [name for name in reversed(peaks) if name != "gflop_per_s"]


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "operation": row["operation"],
        "size": row["size"],
        "device": row["device"],
        "pass": "gradient" if row["gradient"] else "forward",
        "time": time_text(row["seconds"]),
        "GFLOP/s": f"{row['gflop_per_s']:.3g}" if row["flops"] else "",
        "share": f"{row['share']:.1%}",
        "stable": "yes" if row["timing"]["stable"] else "no",
    }


def _roofline(rows: list[dict[str, Any]], most: dict[str, dict[str, float]]) -> Figure:
    """Draws GFLOP/s against operations for each byte, under what the device can do.

    Williams, Waterman and Patterson 2009, Communications of the ACM 52(4).
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows if row["flops"]]
    largest = rows[-1]["size"]
    line = np.geomspace(min(intensities) / 2, max(intensities) * 2, 100)
    for number, (device, peaks) in enumerate(most.items()):
        colour = f"C{number}"
        for level, style in zip(_levels(peaks), ("-", "--", "-.", ":"), strict=False):
            roof = np.minimum(peaks["gflop_per_s"], peaks[level] * line)
            label = f"{device}: {peaks['gflop_per_s']:.0f} GFLOP/s, {level} {peaks[level]:.0f} GB/s"
            axes.loglog(line, roof, style, color=colour, label=label)
        for row in rows:
            if row["device"] == device and row["flops"]:
                place = row["flops"] / row["bytes"], row["gflop_per_s"]
                marker = "o" if row["size"] == largest else "."
                fill = "none" if row["gradient"] else colour
                axes.plot(*place, marker, color=colour, markerfacecolor=fill)
                if row["size"] == largest and not row["gradient"]:
                    axes.annotate(
                        row["operation"],
                        place,
                        xytext=(5, -3),
                        fontsize=8,
                        textcoords="offset points",
                    )
    axes.set(
        xlabel="operations for each byte",
        ylabel="GFLOP/s",
        title=f"roofline: {largest} operations (circles; hollow: with gradient)"
        + (", small ones (dots)" if largest == "large" else ""),
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9)
    return figure
