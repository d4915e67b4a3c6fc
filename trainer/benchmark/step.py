"""`trainer benchmark step`: the time of a configuration's training step, and its parts.

Three calls are measured: the loop as `fit` runs it; a bare epoch, the shortest `tf.function` that
trains the same network on the same batches; and the batches alone, without training.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from trainer import devices as places
from trainer.benchmark.checks import check_device, check_share
from trainer.benchmark.curves import Curves
from trainer.benchmark.devices import select_each
from trainer.benchmark.flops import count_flops
from trainer.benchmark.products import fastest, prepare_products
from trainer.benchmark.result import BenchmarkResult, skipped_gpus, time_text
from trainer.benchmark.timing import Budget, Measurement, run_interleaved
from trainer.config import Config
from trainer.environment import describe_environment
from trainer.errors import CheckError, InputError
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.tensorflow_internals import xla_refusal
from trainer.training.batches import Batches
from trainer.training.step import compute_loss

_logger = logging.getLogger(__name__)

FULL, QUICK = Budget(11, 0.05, 1.0, (1024, 2048)), Budget(7, 0.02, 0.2, (1024,))
_VARIED = ("batch_size", "precision", "jit_compile")  # of the configuration's [training]
_BATCH_SIZES = (32, 128, 512, 2048)
_BLOCKS_PER_CALL = 5  # a call of the loop lasts at most as long as this many blocks


def benchmark_step(
    config: Config,
    words: list[str],
    *,
    batch_sizes: list[int],
    precisions: list[str],
    jit_compile: bool | None = None,
    quick: bool = False,
) -> BenchmarkResult:
    """Measures the training step of a configuration.

    Args:
        config: The experiment. Its seed is also the seed of the order.
        words: Devices, see `trainer.benchmark.devices.select_each`.
        batch_sizes: Empty means 32 to 2048 and the configuration's own.
        precisions: Empty means float32 and the choice of "auto".
        jit_compile: With or without XLA; None means both.
        quick: Measure less: by default only the configuration's own choices, and four times its
            batch size.

    Raises:
        InputError: A device is unknown, or the configuration does not fit its data.
        MissingError: A device is not available.
        CheckError: A rate is impossible, a loss is not finite, or a tensor is on another device.
    """
    names, seed, budget = select_each(words), config.training.seed, QUICK if quick else FULL
    choices = (batch_sizes, precisions, jit_compile)
    rows = [row for name in names for row in _choose_rows(config, name, *choices, quick=quick)]
    dtypes = list(dict.fromkeys(row["precision"].removeprefix("mixed_") for row in rows))
    products = prepare_products(names, ["square"], dtypes, budget, seed=seed)
    skipped = dict(products.skipped)
    prepared, experiment = _prepare_all(config, rows, budget, skipped)
    if not prepared:
        raise InputError(f"nothing was measured: {'; '.join(map(': '.join, skipped.items()))}")
    calls = [call for measured in prepared for call in measured.values()]
    run_interleaved([*calls, *products.baselines], blocks=budget.blocks, seed=seed)
    rows = [_complete(measured, products.baselines) for measured in prepared]
    loops = [measured["loop"] for measured in prepared]
    curves = Curves(loops, "batch_size", _label, first=names[0], seed=seed)
    if quick:
        skipped["other batch sizes and precisions, XLA"] = "--quick measures them only on request"
    spec, parameters = experiment.data.spec, experiment.model.count_params()
    return BenchmarkResult(
        name="step",
        subject=f"training step of {config.model.name} ({parameters:,} parameters) on {spec.name}",
        rows=rows,
        columns=_COLUMNS,
        notes=curves.notes(),
        skipped=skipped | skipped_gpus(names),
        settings={"config": config.model_dump(mode="json"), "devices": names, **asdict(budget)},
        environment=describe_environment(tuple(names), spec.fingerprint),
        facts=curves.facts(),
        baselines=products.baselines,
        figure=_figure(rows, curves),
        size="batch_size",
        scalars=lambda row: {
            f"step_{_label(row)}/{name}": row[name] for name in ("step_ms", "images_per_second")
        },
    )


def _choose_rows(
    config: Config,
    device: str,
    batch_sizes: list[int],
    precisions: list[str],
    jit_compile: bool | None,
    *,
    quick: bool,
) -> list[dict[str, Any]]:
    """Returns the rows of a device, before they are measured; see `benchmark_step`."""
    training, place = config.training, places.single(device)
    own_size, xla = training.batch_size, training.jit_compile
    if quick:
        compilers = [device.startswith("GPU") if xla == "auto" else xla]
        sizes, usual = {own_size, 4 * own_size}, [training.precision]
    else:
        compilers, sizes, usual = [False, True], {own_size, *_BATCH_SIZES}, ["float32", "auto"]
    kinds = precisions or dict.fromkeys(places.choose_precision(name, place) for name in usual)
    if jit_compile is not None:
        compilers = [jit_compile]
    rows = [
        {"device": device, "batch_size": size, "precision": kind, "jit_compile": compiled}
        for size, kind, compiled in itertools.product(
            sorted(set(batch_sizes) or sizes), kinds, compilers
        )
    ]
    for row in rows:
        row["key"] = f"step/{row['batch_size']}/{device}/{_label(row)}"
    return rows


def _prepare_all(
    config: Config, rows: list[dict[str, Any]], budget: Budget, skipped: dict[str, str]
) -> tuple[list[dict[str, Measurement]], Experiment]:
    """Prepares all rows, and adds those that cannot be measured to `skipped`, with the reason.

    Returns:
        The measurements of each row (see `_prepare`), and the experiment of the last row.
    """
    prepared = []
    for row in rows:
        key, device = row["key"], row["device"]
        _logger.info("preparing %s", key.replace("/", " "))
        own = config.with_changes({f"training.{name}": row[name] for name in _VARIED})
        experiment = build_experiment(own, PhaseTimer(), places.single(device))
        if row["batch_size"] > (images := experiment.data.spec.train):
            skipped[key] = f"there are only {images:,} training images"
            continue
        try:
            prepared.append(_prepare(experiment, row, budget))
        except tf.errors.ResourceExhaustedError:
            skipped[key] = f"not enough memory on {device}"
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            refused = xla_refusal(error, experiment.loop.layer_names)
            if refused is None or not row["jit_compile"]:
                raise
            skipped[key] = f"XLA cannot compile {refused}"
    return prepared, experiment


def _prepare(experiment: Experiment, row: dict[str, Any], budget: Budget) -> dict[str, Measurement]:
    """Warms up the "loop", the "bare" epoch and the "batches", and counts the step's arithmetic."""
    device, train = row["device"], experiment.batches("train", shuffled=True)
    images, labels = experiment.data.train.read(slice(row["batch_size"]))
    with tf.device(device):
        batch = tf.identity(tf.constant(images)), tf.identity(tf.constant(labels))
        flops = count_flops(trace_gradients(experiment, batch))
    bare, batches = bare_epoch(experiment, train), bare_epoch(experiment, train, training=False)
    run_bare = _next_steps(bare, train, 1, device)
    seconds = Measurement(run_bare, _wait, budget).call_seconds
    most = max(1, int(_BLOCKS_PER_CALL * budget.block_seconds / seconds))
    steps = min(experiment.loop.steps_per_execution, train.steps, most)
    records = experiment.loop.repeat(train, steps)
    calls = {
        "loop": lambda: next(records),
        "bare": _next_steps(bare, train, steps, device),
        "batches": _next_steps(batches, train, steps, device),
    }
    row |= {"flops": flops, "steps_per_execution": steps}
    measured = {
        name: Measurement(call, _wait, budget, row, parts=steps) for name, call in calls.items()
    }
    check_device(run_bare(), device, row["key"])
    if not np.isfinite(loss := next(records).loss).all():
        raise CheckError(f"{row['key']}: expected a finite loss, received {loss[-1]}")
    return measured


def _next_steps(
    function: Callable[..., tf.Tensor], train: Batches, steps: int, device: str
) -> Callable[[], tf.Tensor]:
    """Returns a call of `function` on the next `steps` batches, epoch after epoch."""

    def positions() -> Iterator[tuple[Any, tf.Tensor]]:
        for epoch in itertools.count():
            state = train.start_epoch(epoch)
            for first in range(0, train.steps - steps + 1, steps):
                yield state, tf.constant(first)

    turn = positions()

    def call() -> tf.Tensor:
        with tf.device(device):
            return function(*next(turn), tf.constant(steps))

    return call


def _gradients(
    experiment: Experiment, images: tf.Tensor, labels: tf.Tensor
) -> tuple[tf.Tensor, Any]:
    """Returns the loss and its gradients, scaled for float16."""
    model = experiment.model
    with tf.GradientTape() as tape:
        outputs = model(images, training=True)
        loss = compute_loss(model, images, labels, outputs, None, training=True)
        scaled = model.optimizer.scale_loss(loss)
    return loss, tape.gradient(scaled, model.trainable_variables)


def bare_epoch(
    experiment: Experiment, train: Batches, *, training: bool = True
) -> Callable[..., tf.Tensor]:
    """Returns the shortest training loop for a network, without metrics, records and callbacks.

    Args:
        experiment: Its model is trained.
        train: The batches.
        training: False reads and augments the batches, and does not train.

    Returns:
        A `tf.function` of the state of an epoch, its first step and the number of steps (int32
        scalars). It returns the last loss.
    """
    model, options = experiment.model, experiment.config.training
    augment = experiment.augmentation or tf.identity

    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        if not training:  # one number of each: TensorFlow removes work that nothing uses
            return tf.cast(images[0, 0, 0, 0], tf.float32) + tf.cast(labels[0], tf.float32)
        loss, gradients = _gradients(experiment, images, labels)
        if options.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, options.clip_norm)
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    if training and options.jit_compile:
        step = tf.function(step, jit_compile=True)

    def steps(state: Any, first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        loss = tf.constant(0.0)
        for i in tf.range(count):
            batch = train.local_batch(train.global_batch(state, first + i))
            loss = step(augment(batch.images), batch.labels)
        return loss

    return cast("Callable[..., tf.Tensor]", tf.function(steps))


def trace_gradients(experiment: Experiment, batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Graph:
    """Returns the graph of forward and backward pass with the shapes of this batch."""
    function = tf.function(functools.partial(_gradients, experiment))
    return cast("Any", function).get_concrete_function(*batch).graph


def _wait() -> None:
    """Waits for all devices, and restores TensorFlow's default for TF32."""
    tf.test.experimental.sync_devices()
    tf.config.experimental.enable_tensor_float_32_execution(enabled=True)


def _complete(measured: dict[str, Measurement], baselines: list[Measurement]) -> dict[str, Any]:
    """Adds the timings and the rates to a row, and returns it.

    Raises:
        CheckError: The rate is far above that of the baselines.
    """
    loop, bare, batches = (measured[name] for name in ("loop", "bare", "batches"))
    row = loop.row
    dtype = row["precision"].removeprefix("mixed_")
    if dtype == "float32" and row["device"].startswith("GPU"):
        dtype = "tf32"  # TensorFlow's default
    same = {"shape": ["square"], "device": [row["device"]], "dtype": [dtype]}
    peak = fastest(baselines, "flops", **same)
    rate = None if row["flops"] is None else row["flops"] / loop.median / 1e9
    if rate is not None:
        check_share(rate, peak, row["key"])
    overhead = loop.relative_to(bare)
    return row | {
        "step_ms": loop.median * 1e3,
        "bare_ms": bare.median * 1e3,
        "batches_ms": batches.median * 1e3,
        "images_per_second": row["batch_size"] / loop.median,
        "gflop_per_s": rate,
        "peak_gflop_per_s": peak,
        "share": None if rate is None else rate / peak,
        "overhead": overhead.median - 1,
        "overhead_interval": [ratio - 1 for ratio in overhead.interval],
        "batches_share": batches.median / loop.median,
        "timing": loop.to_json(),
        "bare_timing": bare.to_json(),
        "batches_timing": batches.to_json(),
    }


def _label(row: dict[str, Any]) -> str:
    return f"{row['precision']}/{'xla' if row['jit_compile'] else 'graph'}"


def _rate_text(row: dict[str, Any]) -> str:
    return "" if row["share"] is None else f"{row['gflop_per_s']:.3g}, {row['share']:.0%}"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "batch": lambda row: f"{row['batch_size']:,}",
    "device": lambda row: str(row["device"]),
    "precision": _label,
    "step": lambda row: time_text(row["step_ms"] / 1e3),
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "GFLOP/s": _rate_text,
    "loop": lambda row: f"{row['overhead']:+.0%}",
    "data": lambda row: f"{row['batches_share']:.1%}",
    "stable": lambda row: "yes" if row["timing"]["stable"] else "no",
}


def _figure(rows: list[dict[str, Any]], curves: Curves) -> Figure:
    """Draws the time of a step against the batch size, and microseconds per image in its parts."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, axes = figure.subplots(1, 2)
    curves.draw(left)
    names = [f"{row['device']} {_label(row)} {row['batch_size']}" for row in rows]
    parts = {
        "bare epoch without its batches": [max(0, r["bare_ms"] - r["batches_ms"]) for r in rows],
        "batches": [row["batches_ms"] for row in rows],
        "rest of the loop": [max(0, row["step_ms"] - row["bare_ms"]) for row in rows],
    }
    start = np.zeros(len(rows))
    for name, milliseconds in parts.items():
        width = np.multiply(milliseconds, [1e3 / row["batch_size"] for row in rows])
        axes.barh(names, width, left=start, label=name)
        start += width
    axes.invert_yaxis()
    axes.margins(x=0.25)  # space for the legend
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="microseconds per image", title="parts of a step")
    axes.legend(fontsize=9)
    return figure
