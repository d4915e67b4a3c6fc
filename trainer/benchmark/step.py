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
    *("share", "overhead", "batches_share"),
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
    return BenchmarkResult(
        name="step",
        subject=f"training step of {config.model.name} on {spec.name}",
        rows=[_complete(parts[i : i + 3], measured) for i in range(0, len(parts), 3)],
        columns=_COLUMNS,
        settings={"config": config.model_dump(mode="json"), **asdict(budget)},
        devices=names,
        x="batch_size",
        scalars=lambda row: {
            f"step_{row['label']}/{name}": row[name] for name in ("step_ms", "images_per_second")
        },
        fingerprint=spec.fingerprint,
        skipped=skipped,
        measured=measured,
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
    """Builds the experiment of a row, and warms up its loop, bare epoch and batches.

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
        row["flops"] = count_flops(trace_gradients(experiment, (images, labels)))
    most = max(1, int(_BLOCKS_PER_CALL * budget.block_seconds / single.call_seconds))
    row["steps_per_execution"] = steps = min(loop.steps_per_execution, train.steps, most)
    bare, batches = bare_epoch(experiment, train), bare_epoch(experiment, train, training=False)
    calls: dict[str, Iterator[Any]] = {
        "loop": repeat_loop(loop, train, steps),
        "bare": _repeat(bare, train, steps, device),
        "batches": _repeat(batches, train, steps, device),
    }
    places.check_placement([next(calls["bare"])], places.single(device))
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


def _repeat(
    function: Callable[..., tf.Tensor], train: Batches, steps: int, device: str
) -> Iterator[tf.Tensor]:
    """Calls `function` with the next `steps` batches, epoch after epoch, and yields its results."""
    for _, state, first in _calls(train, steps):
        with tf.device(device):
            result = function(state, tf.constant(first), tf.constant(steps))
        yield result


def _calls(train: Batches, steps: int) -> Iterator[tuple[int, Any, int]]:
    """Yields the epoch, its state and the first step of each call, without end."""
    for epoch in itertools.count():
        state = train.start_epoch(epoch)
        for first in range(0, train.steps - steps + 1, steps):
            yield epoch, state, first


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
            batch = train.local_batch(state, first + i)
            loss = step(augment(batch.images), batch.labels)
        return loss

    return cast("Callable[..., tf.Tensor]", tf.function(steps))


def trace_gradients(experiment: Experiment, batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Graph:
    """Returns the graph of forward and backward pass with the shapes of this batch."""
    function = tf.function(functools.partial(_gradients, experiment))
    return cast("Any", function).get_concrete_function(*batch).graph


def _complete(parts: list[Measurement], measured: list[Measurement]) -> dict[str, Any]:
    """Returns a complete row. The parts are the loop, the bare epoch and the batches."""
    loop, bare, batches = parts
    device, dtype = loop.row["device"], loop.row["precision"].removeprefix("mixed_")
    if dtype == "float32" and device.startswith("GPU"):
        dtype = "tf32"  # TensorFlow's default
    row = cases.complete_row(loop, measured, "flops", device=device, dtype=dtype)
    # The ratio of interleaved blocks: a slow phase of the machine cancels out.
    ratios = np.divide(loop.block_seconds, bare.block_seconds)
    return row | {
        "step_ms": loop.median * 1e3,
        "bare_ms": bare.median * 1e3,
        "batches_ms": batches.median * 1e3,
        "images_per_second": row["batch_size"] / loop.median,
        "overhead": float(np.median(ratios)) - 1,
        "batches_share": batches.median / loop.median,
    }
