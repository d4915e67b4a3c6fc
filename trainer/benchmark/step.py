"""`trainer benchmark step`: the time of a configuration's training step, and its parts.

Three calls are measured: the loop as `fit` runs it; a bare epoch, the shortest `tf.function` that
trains the same network on the same batches; and the batches alone, without training.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from trainer import data as datasets
from trainer import devices as places
from trainer.benchmark import cases
from trainer.benchmark.cases import Case, UnmeasurableError, baselines_of, synchronize
from trainer.benchmark.curves import crossover_notes, draw_curves, find_crossovers
from trainer.benchmark.devices import select_each
from trainer.benchmark.flops import count_flops
from trainer.benchmark.products import fastest, product_cases
from trainer.benchmark.result import BenchmarkResult, Columns, spread_text, time_text
from trainer.benchmark.timing import Budget, Measurement
from trainer.config import Config
from trainer.errors import CheckError, InputError
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.kernel_internals import xla_refusal
from trainer.training.batches import Batches
from trainer.training.step import compute_loss

FULL, QUICK = Budget(11, 0.05, 1.0, (1024, 2048)), Budget(7, 0.02, 0.2, (1024,))
_VARIED = ("batch_size", "precision", "jit_compile")  # of the configuration's [training]
_BATCH_SIZES = (32, 128, 512, 2048)
_BLOCKS_PER_CALL = 5  # a call of the loop lasts at most as long as this many blocks
_COLUMNS: Columns = {
    "batch": ("batch_size", ","),
    "device": ("device", ""),
    "precision": ("label", ""),
    "step": ("seconds", time_text),
    "IQR": ("timing", spread_text),
    "images/s": ("images_per_second", ",.0f"),
    "GFLOP/s": ("gflop_per_s", ".3g"),
    "share": ("share", ".0%"),
    "loop": ("overhead", "+.0%"),
    "data": ("batches_share", ".1%"),
}


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

    The arguments are the options of `trainer benchmark step`; `words` are those of `--device`.
    Empty lists and None stand for the defaults. A quick measurement has only the configuration's
    own choices by default, and four times its batch size. Its seed is also that of the order.

    Raises:
        InputError: A device is unknown, or the configuration does not fit its data.
        MissingError: A device is not available.
        CheckError: A rate is impossible, a loss is not finite, or a tensor is on another device.
    """
    names, seed, budget = select_each(words), config.training.seed, QUICK if quick else FULL
    compilers = [] if jit_compile is None else [jit_compile]
    values = (sorted({*batch_sizes}), precisions, compilers)
    chosen: dict[str, list[Any]] = dict(zip(_VARIED, values, strict=True))
    rows = [row for name in names for row in _choose_rows(config, name, chosen, quick=quick)]
    dtypes = list(dict.fromkeys(row["precision"].removeprefix("mixed_") for row in rows))
    products = product_cases(names, ["square"], dtypes, budget, seed=seed)
    steps = [Case(row["key"], functools.partial(_prepare, config, row, budget)) for row in rows]
    measured, skipped = cases.measure([*products, *steps], budget, seed=seed)
    baselines, parts = baselines_of(measured), [m for m in measured if "part" in m.row]
    if not parts:
        raise InputError(f"nothing was measured: {'; '.join(map(': '.join, skipped.items()))}")
    rows = [_complete(parts[i : i + 3], baselines) for i in range(0, len(parts), 3)]
    crossovers = find_crossovers(rows, "batch_size", first=names[0])
    if quick:
        skipped["other batch sizes and precisions, XLA"] = "--quick measures them only on request"
    spec, size = datasets.load(config.data).spec, f"{rows[-1]['parameters']:,} parameters"
    return BenchmarkResult(
        name="step",
        subject=f"training step of {config.model.name} ({size}) on {spec.name}",
        rows=rows,
        columns=_COLUMNS,
        notes=crossover_notes(crossovers),
        skipped=skipped,
        settings={"config": config.model_dump(mode="json"), **asdict(budget)},
        devices=names,
        fingerprint=spec.fingerprint,
        facts={"crossovers": crossovers},
        baselines=baselines,
        figure=_figure(rows, crossovers),
        size="batch_size",
        scalars=lambda row: {
            f"step_{row['label']}/{name}": row[name] for name in ("step_ms", "images_per_second")
        },
    )


def _choose_rows(
    config: Config, device: str, chosen: dict[str, list[Any]], *, quick: bool
) -> list[dict[str, Any]]:
    """Returns the rows of a device, before they are measured; see `benchmark_step`."""
    own, place = config.training, places.single(device)
    if quick:
        xla = device.startswith("GPU") if own.jit_compile == "auto" else own.jit_compile
        sizes, usual, compilers = [own.batch_size, 4 * own.batch_size], [own.precision], [xla]
    else:
        sizes, usual = [own.batch_size, *_BATCH_SIZES], ["float32", "auto"]
        compilers = [False, True]
    kinds = list(dict.fromkeys(places.choose_precision(name, place) for name in usual))
    defaults: dict[str, list[Any]] = dict(
        zip(_VARIED, (sorted({*sizes}), kinds, compilers), strict=True)
    )
    rows = []
    for choice in itertools.product(*(chosen[name] or defaults[name] for name in _VARIED)):
        row = dict(zip(_VARIED, choice, strict=True)) | {"device": device}
        row["label"] = f"{row['precision']}/{'xla' if row['jit_compile'] else 'graph'}"
        row["key"] = f"step/{row['batch_size']}/{device}/{row['label']}"
        rows.append(row)
    return rows


def _prepare(config: Config, row: dict[str, Any], budget: Budget) -> list[Measurement]:
    """Builds the experiment of a row, and warms up its loop, bare epoch and batches.

    Raises:
        UnmeasurableError: There are too few images, or XLA cannot compile the network.
        CheckError: A loss is not finite, or a tensor is on another device.
    """
    own = config.with_changes({f"training.{name}": row[name] for name in _VARIED})
    experiment = build_experiment(own, PhaseTimer(), places.single(row["device"]))
    if row["batch_size"] > (images := experiment.data.spec.train):
        raise UnmeasurableError(f"there are only {images:,} training images")
    try:
        return _measurements(experiment, row, budget)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        refused = xla_refusal(error, experiment.loop.layer_names)
        if refused is None or not row["jit_compile"]:
            raise
        raise UnmeasurableError(f"XLA cannot compile {refused}") from None


def _measurements(experiment: Experiment, row: dict[str, Any], budget: Budget) -> list[Measurement]:
    device, train = row["device"], experiment.batches("train", shuffled=True)
    images, labels = experiment.data.train.read(slice(row["batch_size"]))
    with tf.device(device):
        batch = tf.identity(tf.constant(images)), tf.identity(tf.constant(labels))
        row["flops"] = count_flops(trace_gradients(experiment, batch))
    row["parameters"] = experiment.model.count_params()
    bare, batches = bare_epoch(experiment, train), bare_epoch(experiment, train, training=False)
    run_bare = _next_steps(bare, train, 1, device)
    seconds = Measurement(run_bare, synchronize, budget).call_seconds
    most = max(1, int(_BLOCKS_PER_CALL * budget.block_seconds / seconds))
    steps = min(experiment.loop.steps_per_execution, train.steps, most)
    row["steps_per_execution"] = steps
    records = experiment.loop.repeat(train, steps)
    calls = {
        "loop": lambda: next(records),
        "bare": _next_steps(bare, train, steps, device),
        "batches": _next_steps(batches, train, steps, device),
    }
    measured = [
        Measurement(call, synchronize, budget, row | {"part": name}, parts=steps)
        for name, call in calls.items()
    ]
    cases.check_device(run_bare(), device, row["key"])
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


def _complete(parts: list[Measurement], baselines: list[Measurement]) -> dict[str, Any]:
    """Adds the timings and the rates to a row, and returns it.

    Args:
        parts: The loop, the bare epoch and the batches.
        baselines: Matrix products.

    Raises:
        CheckError: The rate is far above that of the baselines.
    """
    loop, bare, batches = parts
    row = loop.row
    dtype = row["precision"].removeprefix("mixed_")
    if dtype == "float32" and row["device"].startswith("GPU"):
        dtype = "tf32"  # TensorFlow's default
    peak, rate = fastest(baselines, "flops", device=row["device"], dtype=dtype), None
    if row["flops"] is not None:
        rate = row["flops"] / loop.median / 1e9
        cases.check_share(rate, peak, row["key"])
    # The ratio of interleaved blocks: a slow phase of the machine cancels out.
    ratios = np.divide(loop.block_seconds, bare.block_seconds)
    low, overhead, high = (float(each) - 1 for each in np.percentile(ratios, [25, 50, 75]))
    return row | {
        "seconds": loop.median,
        "step_ms": loop.median * 1e3,
        "bare_ms": bare.median * 1e3,
        "batches_ms": batches.median * 1e3,
        "images_per_second": row["batch_size"] / loop.median,
        "gflop_per_s": rate,
        "peak_gflop_per_s": peak,
        "share": None if rate is None else rate / peak,
        "overhead": overhead,
        "overhead_quartiles": [low, high],
        "batches_share": batches.median / loop.median,
        "timing": loop.timing(),
        "bare_timing": bare.timing(),
        "batches_timing": batches.timing(),
    }


def _figure(rows: list[dict[str, Any]], crossovers: dict[str, Any]) -> Figure:
    """Draws the time of a step against the batch size."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    draw_curves(figure.subplots(), rows, "batch_size", crossovers)
    return figure
