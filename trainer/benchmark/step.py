"""`trainer benchmark step`: the time of a configuration's training step, and its parts.

Two calls are measured: the loop as `fit` runs it, and the batches alone, without training.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from trainer import devices as places
from trainer.benchmark import cases
from trainer.benchmark.cases import select_each, synchronize
from trainer.benchmark.flops import count_flops
from trainer.benchmark.matmul import product_cases
from trainer.benchmark.result import BenchmarkResult
from trainer.benchmark.timing import Budget, Measurement
from trainer.config import Config
from trainer.errors import CheckError, InputError
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.training.batches import Batches
from trainer.training.loop import CallRecord, Loop
from trainer.training.step import compute_loss

FULL, QUICK = Budget(11, 0.05, 1.0, (1024, 2048)), Budget(7, 0.02, 0.2, (1024,))
_BATCH_SIZES = (32, 128, 512, 2048)
_BLOCKS_PER_CALL = 5  # a call of the loop lasts at most as long as this many blocks
_COLUMNS = (
    *("batch_size", "device", "label", "seconds", "timing", "images_per_second", "gflop_per_s"),
    *("share", "batches_share"),
)


def benchmark_step(
    config: Config,
    words: list[str] | None,
    *,
    batch_sizes: list[int] | None = None,
    precisions: list[str] | None = None,
    jit_compile: bool | None = None,
    quick: bool = False,
) -> BenchmarkResult:
    """Measures the training step of a configuration.

    The arguments are the options of `trainer benchmark step`; `words` are those of `--device`.
    None stands for the default. A quick measurement has only the configuration's own choices by
    default, and four times its batch size.

    Raises:
        CheckError: A rate is impossible, a loss is not finite, or a tensor is on another device.
    """
    names, own, budget = select_each(words), config.training, QUICK if quick else FULL
    sizes = batch_sizes or [own.batch_size, *([4 * own.batch_size] if quick else _BATCH_SIZES)]
    kinds = precisions or ([own.precision] if quick else ["float32", "auto"])
    compilers: list[Any] = [own.jit_compile] if quick else [False, True]
    if jit_compile is not None:
        compilers = [jit_compile]
    choices = itertools.product(names, sorted({*sizes}), kinds, compilers)
    rows = {row["key"]: row for row in itertools.starmap(_row, choices)}
    # An error of the configuration ends the benchmark; later, an InputError skips a row.
    spec = build_experiment(config, PhaseTimer(), places.single(names[0])).data.spec
    dtypes = list(dict.fromkeys(row["precision"].removeprefix("mixed_") for row in rows.values()))
    products = product_cases(names, {"square": dtypes}, budget, seed=own.seed)
    steps = [(key, functools.partial(_prepare, config, rows[key], budget)) for key in rows]
    measured, skipped = cases.measure([*products, *steps], budget, seed=own.seed)
    parts = [each for each in measured if "part" in each.row]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return BenchmarkResult(
        name="step",
        subject=f"training step of {config.model.name} on {spec.name}",
        rows=[_complete(*pair, measured) for pair in pairs],
        columns=_COLUMNS,
        settings={"config": config.model_dump(mode="json"), **asdict(budget)},
        devices=names,
        x="batch_size",
        fingerprint=spec.fingerprint,
        skipped=skipped,
    )


def _row(device: str, batch_size: int, precision: str, jit_compile: bool | str) -> dict[str, Any]:
    """Returns a row before it is measured. "auto" is resolved."""
    precision = places.choose_precision(precision, places.single(device))
    if jit_compile == "auto":
        jit_compile = device.startswith("GPU")
    label = f"{precision}/{'xla' if jit_compile else 'graph'}"
    key = f"step/{batch_size}/{device}/{label}"
    row = {"key": key, "device": device, "label": label, "batch_size": batch_size}
    return row | {"precision": precision, "jit_compile": jit_compile}


def _prepare(config: Config, row: dict[str, Any], budget: Budget) -> list[Measurement]:
    """Builds the experiment of a row, and warms up its loop and batches.

    Raises:
        InputError: There are too few images, or XLA cannot compile the network.
        CheckError: A loss is not finite, or a tensor is on another device.
    """
    device, varied = row["device"], ("batch_size", "precision", "jit_compile")
    own = config.with_changes({f"training.{name}": row[name] for name in varied})
    experiment = build_experiment(own, PhaseTimer(), places.single(device))
    if row["batch_size"] > (images := experiment.data.spec.train):
        raise InputError(f"there are only {images:,} training images")
    loop, train = experiment.loop, experiment.batches("train", shuffled=True)
    records = repeat_loop(loop, train, 1)
    single = Measurement(functools.partial(next, records), synchronize, budget)
    if not np.isfinite(loss := next(records).loss).all():
        raise CheckError(f"{row['key']}: expected a finite loss, received {loss[-1]}")
    examples = experiment.data.train.read(slice(row["batch_size"]))
    with tf.device(device):
        images, labels = (tf.identity(tf.constant(array)) for array in examples)
        row["flops"] = count_flops(trace_gradients(experiment.model, images, labels))
    most = max(1, int(_BLOCKS_PER_CALL * budget.block_seconds / single.call_seconds))
    row["steps_per_execution"] = steps = min(loop.steps_per_execution, train.steps, most)
    calls: dict[str, Iterator[Any]] = {
        "loop": repeat_loop(loop, train, steps),
        "batches": repeat_batches(experiment, train, steps, device),
    }
    places.check_placement([next(calls["batches"])], places.single(device))
    return [
        Measurement(
            functools.partial(next, results), synchronize, budget, row | {"part": name}, parts=steps
        )
        for name, results in calls.items()
    ]


def repeat_loop(loop: Loop, train: Batches, steps: int) -> Iterator[CallRecord]:
    """Trains in calls of `steps` steps, at most one epoch, and yields their records without end."""
    for epoch, state, first in _calls(train, steps):
        yield loop.run_call(train, state, epoch, first, steps)


def repeat_batches(
    experiment: Experiment, train: Batches, steps: int, device: str
) -> Iterator[tf.Tensor]:
    """Reads and augments the batches of the same calls, and yields a number of the last batch."""
    augment = experiment.augmentation or tf.identity

    @tf.function
    def read(state: Any, first: tf.Tensor) -> tf.Tensor:
        found = tf.constant(0.0)
        for i in tf.range(steps):
            batch = train.local_batch(state, first + i)
            # One number of each: TensorFlow removes work that nothing uses.
            numbers = augment(batch.images)[0, 0, 0, 0], batch.labels[0]
            found = tf.add_n([tf.cast(number, tf.float32) for number in numbers])
        return found

    for _, state, first in _calls(train, steps):
        with tf.device(device):
            found = read(state, tf.constant(first))
        yield found


def _calls(train: Batches, steps: int) -> Iterator[tuple[int, Any, int]]:
    """Yields the epoch, its state and the first step of each call, without end."""
    for epoch in itertools.count():
        state = train.start_epoch(epoch)
        for first in range(0, train.steps - steps + 1, steps):
            yield epoch, state, first


def trace_gradients(model: keras.Model, images: tf.Tensor, labels: tf.Tensor) -> tf.Graph:
    """Returns the graph of forward and backward pass with the shapes of this batch."""

    def differentiate(images: tf.Tensor, labels: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            loss = compute_loss(model, images, labels, outputs, None, training=True)
        return tape.gradient(loss, model.trainable_variables)

    return cast("Any", tf.function(differentiate)).get_concrete_function(images, labels).graph


def _complete(loop: Measurement, batches: Measurement, measured: list[Measurement]) -> Any:
    """Returns a complete row from the measurements of the loop and of the batches alone."""
    device, dtype = loop.row["device"], loop.row["precision"].removeprefix("mixed_")
    if dtype == "float32" and device.startswith("GPU"):
        dtype = "tf32"  # TensorFlow's default
    row = cases.complete_row(loop, measured, "flops", device=device, dtype=dtype)
    return row | {
        "step_ms": loop.median * 1e3,
        "batches_ms": batches.median * 1e3,
        "images_per_second": row["batch_size"] / loop.median,
        "batches_share": batches.median / loop.median,
    }
