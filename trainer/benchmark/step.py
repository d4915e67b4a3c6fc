"""The real training step of a configuration: what it takes, on what device, and where it goes.

Three things are timed, each by the step: the loop as `fit` runs it; a bare epoch, which is the
shortest `tf.function` a person would write by hand to go through the same batches; and the batches
alone, chosen, gathered and augmented, with nothing trained on them.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import tensorflow as tf

from trainer import devices as places
from trainer.benchmark import checks, matmul
from trainer.benchmark.flops import count_flops
from trainer.benchmark.matmul import Effort, Measurements
from trainer.benchmark.timing import Measurement, Timing, take_turns
from trainer.config import Config
from trainer.data import DataSpec
from trainer.errors import CheckError, InputError, did_you_mean
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.tensorflow_internals import xla_refusal
from trainer.training.batches import Batches
from trainer.training.step import compute_loss

_logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
_BATCH_SIZES = (32, 128, 512, 2048)
# A call of the loop has as many steps as in training, or as take so many blocks.
_CALL_BLOCKS = 5
FULL = Effort((), (1024, 2048), blocks=11, block_seconds=0.05, warm_up_seconds=1.0)
QUICK = Effort((), (1024,), blocks=7, block_seconds=0.02, warm_up_seconds=0.2)


@dataclass(frozen=True)
class Case:
    """One way to run the step.

    Attributes:
        device: For example "GPU:0".
        batch_size: Images a step.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        jit_compile: Whether the step is compiled with XLA.
    """

    device: str
    batch_size: int
    precision: str
    jit_compile: bool

    @property
    def compiler(self) -> str:
        """What makes the step's graph run: "xla" or "graph"."""
        return "xla" if self.jit_compile else "graph"

    @property
    def key(self) -> str:
        """Names the case in a file of results."""
        return f"step/{self.batch_size}/{self.device}/{self.precision}/{self.compiler}"

    @property
    def peak_dtype(self) -> str:
        """The type whose products bound the step, as `trainer.benchmark.matmul` names it."""
        if self.precision != "float32":
            return self.precision.removeprefix("mixed_")
        return "tf32" if self.device.startswith("GPU") else "float32"  # TensorFlow's default


@dataclass(frozen=True)
class Measured:
    """A case with what is measured of it.

    Attributes:
        case: What it is.
        steps: In each call.
        flops: Of the products of a step; None where they cannot be counted.
        loop: A call of the loop.
        bare: As many steps of a bare epoch.
        batches: As many batches, nothing trained on them.
    """

    case: Case
    steps: int
    flops: int | None
    loop: Measurement
    bare: Measurement
    batches: Measurement

    def timings(self) -> dict[str, Timing]:
        """Returns how long a step takes in each of the three."""
        parts = {"loop": self.loop, "bare": self.bare, "batches": self.batches}
        return {name: part.timing().of_each(self.steps) for name, part in parts.items()}


@dataclass(frozen=True)
class Found:
    """Everything a run measures.

    Attributes:
        cases: In the order of their sizes.
        products: What their rate is held against.
        skipped: What was left out, and why.
        data: Of the configuration.
        parameters: Of its network.
    """

    cases: list[Measured]
    products: Measurements
    skipped: dict[str, str]
    data: DataSpec
    parameters: int


def measure(config: Config, cases: list[Case], effort: Effort) -> Found:
    """Measures the cases, taking turns with the products they are held against.

    Args:
        config: The experiment; its seed is that of the order, too.
        cases: At least one.
        effort: How much.

    Raises:
        InputError: The configuration does not fit its data.
        CheckError: Outputs are elsewhere.
    """
    names = list(dict.fromkeys(case.device for case in cases))
    dtypes = list(dict.fromkeys(case.precision.removeprefix("mixed_") for case in cases))
    seed = config.training.seed
    products = matmul.prepare(names, ["square"], dtypes, effort, seed=seed)
    measured, skipped = [], dict(products.skipped)
    for case in cases:
        _logger.info("preparing %s", case.key.replace("/", " "))
        experiment = build_experiment(
            _configured(config, case), PhaseTimer(), places.single(case.device)
        )
        if case.batch_size > (images := experiment.data.spec.train):
            skipped[case.key] = f"there are only {images:,} training images"
            continue
        try:
            measured.append(_prepare(experiment, case, effort))
        except tf.errors.ResourceExhaustedError:
            skipped[case.key] = f"no memory on {case.device}"
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            refused = xla_refusal(error, experiment.loop.layer_names) if case.jit_compile else None
            if refused is None:
                raise
            skipped[case.key] = f"XLA cannot compile {refused}"
    if not measured:
        raise InputError(f"nothing was measured: {'; '.join(map(': '.join, skipped.items()))}")
    _logger.info("measuring: %d blocks of each, in turns", effort.blocks)
    parts = [part for each in measured for part in (each.loop, each.bare, each.batches)]
    take_turns([*parts, *products.all_references()], blocks=effort.blocks, seed=seed)
    return Found(measured, products, skipped, experiment.data.spec, experiment.model.count_params())


def choose_cases(
    config: Config,
    names: list[str],
    batch_sizes: list[int],
    precisions: list[str],
    jit_compile: bool | None,
    *,
    quick: bool,
) -> list[Case]:
    """Returns what was asked for, and where nothing was, what suits the effort.

    Args:
        config: The experiment.
        names: Devices.
        batch_sizes: None means some between 32 and 2048 and the configuration's own.
        precisions: None means float32 and what "auto" chooses.
        jit_compile: With XLA or without; None means both.
        quick: Where nothing is said, only what the configuration says, and four times its batch.

    Raises:
        InputError: A size or a precision cannot be.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise InputError(f"--precision: {precision!r}: {did_you_mean(precision, PRECISIONS)}")
    for size in batch_sizes:
        if size < 1:
            raise InputError(f"--batch-size: expected 1 or more, received {size}")
    training = config.training
    own = training.batch_size
    usual = {own, 4 * own} if quick else {own, *_BATCH_SIZES}
    sizes = sorted(set(batch_sizes) or usual)
    cases = []
    for name in names:
        own_compiler = training.jit_compile
        if own_compiler == "auto":
            own_compiler = name.startswith("GPU")
        both = [own_compiler] if quick else [False, True]
        compilers = both if jit_compile is None else [jit_compile]
        chosen = places.choose_precision(training.precision, places.single(name))
        fast = places.choose_precision("auto", places.single(name))
        kinds = precisions or ([chosen] if quick else list(dict.fromkeys(["float32", fast])))
        every = itertools.product(sizes, kinds, compilers)
        cases += [Case(name, size, kind, compiled) for size, kind, compiled in every]
    return cases


def _configured(config: Config, case: Case) -> Config:
    return config.with_changes(
        {
            "training.batch_size": case.batch_size,
            "training.precision": case.precision,
            "training.jit_compile": case.jit_compile,
        }
    )


def _prepare(experiment: Experiment, case: Case, effort: Effort) -> Measured:
    """Makes the three calls of a case, warms them up, and counts the step's arithmetic."""
    images, labels = experiment.data.train.read(slice(case.batch_size))
    with tf.device(case.device):
        batch = tf.identity(tf.constant(images)), tf.identity(tf.constant(labels))
        flops = count_flops(_traced_once(experiment, batch))
    train = experiment.batches("train", shuffled=True)
    bare = bare_epoch(experiment, train)

    def bare_calls(steps: int) -> Callable[[], tf.Tensor]:
        turn = _positions(train, steps)

        def call() -> tf.Tensor:
            with tf.device(case.device):
                return bare(*next(turn), tf.constant(steps))

        return call

    run_bare = bare_calls(1)
    once = effort.start(run_bare, _wait)
    most = max(1, int(_CALL_BLOCKS * effort.block_seconds / once.call_seconds))
    steps = min(experiment.loop.steps_per_execution, train.steps, most)
    windows = experiment.loop.repeat(train, steps)
    measured = Measured(
        case,
        steps,
        flops,
        loop=effort.start(lambda: next(windows), _wait),
        bare=effort.start(bare_calls(steps), _wait),
        batches=effort.start(_batches_alone(experiment, train, steps), _wait),
    )
    checks.check_device(run_bare(), case.device, case.key)
    if not np.isfinite(loss := next(windows).loss).all():
        raise CheckError(f"{case.key}: expected a finite loss, received {loss[-1]}")
    return measured


def bare_epoch(experiment: Experiment, train: Batches) -> Callable[..., tf.Tensor]:
    """Returns what a person would write by hand for this network, and nothing more.

    Args:
        experiment: Its model is trained.
        train: The batches, of which the bare epoch takes whole ones alone.

    Returns:
        A `tf.function` of the state of an epoch, its first step and a number of steps (int32
        scalars), which trains on these batches and returns the last loss. No metrics, no records,
        no callbacks.
    """
    model, training = experiment.model, experiment.config.training
    weights, augment = model.trainable_variables, experiment.augmentation or tf.identity

    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            loss = compute_loss(model, images, labels, outputs, None, training=True)
            scaled = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, weights)
        if training.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, training.clip_norm)
        model.optimizer.apply(gradients, weights)
        return loss

    compiled = tf.function(step, jit_compile=True) if training.jit_compile else step

    def steps(state: Any, first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        loss = tf.constant(0.0)
        for i in tf.range(count):
            batch = train.local_batch(train.global_batch(state, first + i))
            loss = compiled(augment(batch.images), batch.labels)
        return loss

    return cast("Callable[..., tf.Tensor]", tf.function(steps))


def _traced_once(experiment: Experiment, batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Graph:
    """Returns the graph of forward and backward pass, with this batch's shapes."""
    model = experiment.model

    def derive(images: tf.Tensor, labels: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(images, training=True)
            loss = compute_loss(model, images, labels, outputs, None, training=True)
        gradients = tape.gradient(loss, model.trainable_variables)
        return [tf.convert_to_tensor(g) for g in gradients if g is not None]

    function = cast("Any", tf.function(derive))
    return cast("tf.Graph", function.get_concrete_function(*batch).graph)


def _positions(train: Batches, steps: int) -> Iterator[tuple[Any, tf.Tensor]]:
    """Gives, epoch after epoch, its state and where each call of so many steps begins."""
    for epoch in itertools.count():
        state = train.start_epoch(epoch)
        for first in range(0, train.steps - steps + 1, steps):
            yield state, tf.constant(first)


def _batches_alone(experiment: Experiment, train: Batches, steps: int) -> Callable[[], Any]:
    """Returns what chooses, gathers and augments the batches of `steps` steps."""
    augment = experiment.augmentation or tf.identity

    def gather(state: Any, first: tf.Tensor) -> tf.Tensor:
        seen = tf.constant(0, tf.int64)
        for i in tf.range(steps):
            batch = train.local_batch(train.global_batch(state, first + i))
            # One number of each keeps them from being left out.
            first_pixel = tf.cast(augment(batch.images)[0, 0, 0, 0], tf.int64)
            seen += first_pixel + batch.labels[0]
        return seen

    turn = _positions(train, steps)
    compiled = cast("Callable[..., tf.Tensor]", tf.function(gather))

    def gather_next() -> tf.Tensor:
        with tf.device(experiment.devices.names[0]):
            return compiled(*next(turn))

    return gather_next


def _wait() -> None:
    """Waits for all devices, and has float32 numbers multiplied as TensorFlow does by itself."""
    tf.test.experimental.sync_devices()
    tf.config.experimental.enable_tensor_float_32_execution(enabled=True)
