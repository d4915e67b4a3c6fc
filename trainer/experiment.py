"""Everything that a training or an evaluation needs, built from a configuration.

What does not fit together is found out here, before anything is written and trained.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from pydantic import ValidationError

from trainer import data as datasets
from trainer import devices, keras_objects, models
from trainer.cluster import Cluster
from trainer.config import Config, KerasObject
from trainer.data import Dataset, DataSpec, Split
from trainer.devices import Devices
from trainer.errors import InputError
from trainer.files import sha256
from trainer.run import Run
from trainer.training import losses  # noqa: F401 - registers its class by name
from trainer.training.augmentation import Augmentation, make_augmentation
from trainer.training.batches import Batches, make_batches, steps_per_epoch
from trainer.training.callback_options import check_callback
from trainer.training.checkpoint import load_weights
from trainer.training.loop import Loop
from trainer.training.optimizer import make_optimizer, try_optimizer
from trainer.training.step import compute_loss, find_step, metric_tensors, train_step

# What a metric cannot be called: it would take the place of a number of our own.
_RESERVED = {
    *("loss", "learning_rate", "epoch", "step", "step_ms", "step_ms_quartiles", "windows"),
    *(
        "outputs",
        "gradient_norms",
        "images_per_second",
        "run",
        "data",
        "split",
        "images",
        "devices",
        "precision",
    ),
}


class PhaseTimer:
    """Seconds of each named part, one after the other."""

    def __init__(self, import_seconds: float | None = None) -> None:
        """Starts.

        Args:
            import_seconds: What importing took before.
        """
        self.seconds: dict[str, float] = {}
        self.import_seconds = import_seconds
        self._start = time.perf_counter()

    def total(self) -> float:
        """Returns the seconds since the start, importing included."""
        return time.perf_counter() - self._start + (self.import_seconds or 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds of what is within to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Experiment:
    """Everything that a training or an evaluation needs.

    Attributes:
        config: With "auto" and fallbacks resolved.
        data: The splits and what is known about them.
        devices: The chosen ones.
        placed: Where the outputs were found.
        model: Built and compiled.
        loop: Trains and evaluates the model.
        augmentation: What alters training images, if anything does.
    """

    config: Config
    data: Dataset
    devices: Devices
    placed: list[str]
    model: keras.Model
    loop: Loop
    augmentation: Augmentation | None

    @property
    def random_state(self) -> list[Any]:
        """Variables that are not the model's own: of augmentation."""
        return [] if self.augmentation is None else self.augmentation.variables

    def scored(self, split: str) -> Split:
        """Returns the images of a split that are scored: under `limit_batches` a fixed sample."""
        training, images = self.config.training, self.data.split(split)
        if training.limit_batches is None:
            return images
        count = training.limit_batches * training.batch_size
        return images.sample(count, self.config.data.split_seed)

    def batches(self, split: str, *, shuffled: bool = False) -> Batches:
        """Returns the batches of a split: all in its order (`scored`), or shuffled anew each epoch.

        Args:
            split: "train", "validation" or "test".
            shuffled: `limit_batches` then takes the first batches of each epoch.
        """
        training = self.config.training
        return make_batches(
            self.data.split(split) if shuffled else self.scored(split),
            self.config.data,
            self.devices,
            batch_size=training.batch_size,
            seed=training.seed if shuffled else None,
            limit_batches=training.limit_batches,
        )

    def training_batches(self, timer: "PhaseTimer") -> tuple[Batches, Batches]:
        """Brings train and validation to the device."""
        with timer.part("to_device"):
            return self.batches("train", shuffled=True), self.batches("validation")


def build_experiment(
    config: Config,
    timer: PhaseTimer,
    chosen: Devices | None = None,
    *,
    cluster: Cluster | None = None,
    restored: Run | None = None,
) -> Experiment:
    """Chooses devices, loads data, builds and compiles the network; resolves what was left open.

    Args:
        config: The experiment.
        timer: Takes the seconds of each part.
        chosen: Devices that take the place of the configuration's.
        cluster: The workers to train with, each by the same configuration on the same data.
        restored: A finished run whose network takes the place of a new one, to be evaluated.

    Raises:
        InputError: Something in the configuration does not fit the rest.
        MissingError: The device that was asked for is not here.
        CheckError: The outputs are not on the device asked for.
    """
    with timer.part("devices"):
        chosen = chosen or devices.select(
            config.training.device,
            cluster,
            cluster_timeout_seconds=config.training.cluster_timeout_seconds,
        )
        precision = devices.choose_precision(config.training.precision, chosen)
    # Before the data, which may have to be fetched first.
    models.find(config.model)
    try_optimizer(config.optimizer)
    step = find_step(config.training.step) if restored is None else train_step
    with timer.part("data"):
        data = datasets.load(config.data)
    if restored is not None:
        require_data(restored, spec_of(restored).fingerprint, data.spec)
    settings = {f"{s}.{k}": v for s, table in config.model_dump().items() for k, v in table.items()}
    chosen.require_same(settings | {"the data itself": data.spec.fingerprint})
    resolved: dict[str, Any] = {
        "data": datasets.resolve(config.data).model_dump(),
        "model": models.resolve(config.model).model_dump(),
        "training.precision": precision,
    }
    if data.spec.name == "mnist_sample":
        resolved["data.name"] = data.spec.name  # what evaluate shall load, even with a network
    with timer.part("model"):
        keras.utils.set_random_seed(config.training.seed)
        if config.training.deterministic:
            tf.config.experimental.enable_op_determinism()
        with devices.dtype_policy(precision), chosen.scope():
            if restored is None:
                model = compiled_model(config, data.spec)
                augmentation = make_augmentation(config.data.augmentation, data)
            else:
                model, augmentation = restore(restored, chosen, compiled=True), None
        placed = _check_forward(model, data, chosen)
        resolved["training.jit_compile"] = _resolve_jit_compile(config, model, chosen)
        config = config.with_changes(resolved)
        loop = Loop(
            model,
            chosen,
            step=step,
            steps_per_execution=config.training.steps_per_execution,
            clip_norm=config.training.clip_norm,
            jit_compile=bool(config.training.jit_compile),
            augment=augmentation,
            gradient_norms=config.logging.histograms,
        )
    return Experiment(config, data, chosen, placed, model, loop, augmentation)


def _check_forward(model: keras.Model, data: Dataset, chosen: Devices) -> list[str]:
    """Sends a few images through network, loss and metrics: what does not fit is known at once.

    Returns:
        Where the outputs were found.

    Raises:
        InputError: The loss or a metric does not fit what the network gives.
        CheckError: The outputs are not on the devices asked for.
    """
    # Unlike the number of classes, so that no loss fits by chance of broadcasting.
    few = 4 if data.spec.class_count == 3 else 3
    images, labels = data.train.read(slice(few))
    strategy = chosen.strategy
    try:
        with _without_advice(), chosen.scope():
            outputs = strategy.experimental_local_results(
                strategy.run(lambda images: model(images, training=False), args=(images,))
            )
    except keras_objects.KERAS_ERRORS as error:
        reason = keras_objects.explain(error)
        raise InputError(f"the network cannot be run on images of the data: {reason}") from error
    placed = devices.check_placement(outputs, chosen)
    try:
        with chosen.scope():
            loss = compute_loss(model, images, labels, outputs[0], None, training=False)
            model.compute_metrics(images, labels, outputs[0])
            logs = metric_tensors(model.get_metrics_result())
            model.reset_metrics()
    except keras_objects.KERAS_ERRORS as error:
        reason = keras_objects.explain(error)
        raise InputError(
            "training.loss or training.metrics does not fit: expected what takes labels (int [n]) "
            f"and probabilities (float [n, {data.spec.class_count}]): {reason}"
        ) from error
    strange = [name for name, value in logs.items() if not _is_number(value.dtype)]
    if strange:
        raise InputError(f"training.metrics: expected numbers, received text in {strange[0]!r}")
    _refuse_reserved(logs.keys() - {"loss"})
    for metric in keras_objects.compiled_metrics(model):
        if isinstance(result := metric.result(), dict):  # whose names are those of logs
            _refuse_reserved(metric_tensors(result))
    sums = outputs[0].numpy().sum(axis=1)
    if not np.allclose(sums, 1, atol=0.01):
        raise InputError(
            "expected a network that returns probabilities, each row adding up to 1; received "
            f"rows that add up to {sums.round(3).tolist()} (does it end in a softmax?)"
        )
    if loss.shape != ():
        raise InputError(
            f"training.loss: expected one number for a batch, received {list(loss.shape)}: "
            "its reduction is 'none'"
        )
    return placed


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps TensorFlow from advising a graph where several devices do something once."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def compiled_model(config: Config, spec: DataSpec) -> keras.Model:
    """Builds and compiles the network of a configuration, for a data set.

    Raises:
        InputError: A name is unknown, or an option is refused.
    """
    training = config.training
    model = models.build(config.model, spec)
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        _normalize_by_the_whole_batch(model)
    metrics = [keras_objects.make("metric", metric) for metric in training.metrics]
    _refuse_reserved(metric.name for metric in metrics)
    steps = steps_per_epoch(spec.train, training.batch_size, training.limit_batches)
    model.compile(
        optimizer=make_optimizer(config.optimizer, steps * training.epochs),
        loss=keras_objects.make("loss", training.loss),
        metrics=metrics,
        jit_compile=training.jit_compile,
    )
    return model


def _resolve_jit_compile(config: Config, model: keras.Model, chosen: Devices) -> bool:
    """Resolves "auto": Keras's rule on one GPU; off elsewhere.

    On a CPU, XLA makes the step 4 to 6 times slower (docs/performance.md).
    """
    wanted = config.training.jit_compile
    if wanted == "auto":
        # Keras's own "auto", which it has resolved by now: can every layer be compiled?
        wanted = chosen.type == "GPU" and chosen.replicas == 1 and bool(model.jit_compile)
    if not wanted:
        model.jit_compile = False  # for Keras's own fit() and evaluate(), too
    return wanted


def _normalize_by_the_whole_batch(model: keras.Model) -> None:
    """Makes several devices normalize as one device does, and keep the same averages."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True


def restore(
    run: Run,
    chosen: Devices | None = None,
    *,
    precision: str | None = None,
    compiled: bool = False,
) -> keras.Model:
    """Builds the network of a finished run with its weights.

    Only its module of `trainer/models` is called: what else the training needed may be gone.

    Args:
        run: A finished run.
        chosen: Devices that hold the network; None: the default device.
        precision: Of the network; None: as it was trained.
        compiled: Also restore loss, metrics and the optimizer with its state.

    Raises:
        InputError: The run is damaged, or something that its network is built from is missing.
    """
    config, spec = run.config(), spec_of(run)
    policy = devices.dtype_policy(precision or config.training.precision)
    try:
        with policy, nullcontext() if chosen is None else chosen.scope():
            if compiled:
                model = compiled_model(config, spec)
                model.optimizer.build(model.trainable_variables)
            else:
                model = models.build(config.model, spec)
    except InputError as error:
        raise InputError(f"run {run.name} cannot be restored: {error}") from error
    _load_final_weights(run, model)
    return model


def require_data(run: Run, expected: str | None, found: DataSpec) -> None:
    """Refuses data that a run was not trained on.

    Args:
        run: For the message.
        expected: Fingerprint of the data that the run was trained on.
        found: The data.

    Raises:
        InputError: The fingerprints differ.
    """
    if found.fingerprint != expected:
        raise InputError(
            f"the data is not what {run.name} was trained on: expected fingerprint {expected}, "
            f"found {found.fingerprint} ({found.origin})"
        )


def _load_final_weights(run: Run, model: keras.Model) -> None:
    """Reads the weights of a finished run, if they are what was written.

    Raises:
        InputError: They are missing, were changed, or are of another architecture.
    """
    expected = run.read_json("summary.json").get("weights_sha256")
    found = sha256(run.weights) if run.weights.is_file() else None
    if found != expected:
        raise InputError(
            f"{run.weights} is damaged: expected sha256 {expected}, found {found or 'no file'}"
        )
    load_weights(run.weights, model)


def spec_of(run: Run) -> DataSpec:
    """Returns what a finished run knows of its data, without loading it.

    Raises:
        InputError: Its summary.json is damaged.
    """
    try:
        return DataSpec.model_validate(run.read_json("summary.json")["data"])
    except (KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{run.path / 'summary.json'} is damaged: {reason}") from None


def make_callbacks(
    experiment: Experiment, folder: Path, given: Sequence[keras.callbacks.Callback] = ()
) -> list[keras.callbacks.Callback]:
    """Makes the callbacks of the configuration, and checks them and those given in Python.

    Args:
        experiment: Its configuration names them; its model says what they can monitor.
        folder: The run directory, which takes the place of "{run}" in an option.
        given: Callbacks that follow those of the configuration.

    Returns:
        All of them, in order.

    Raises:
        InputError: One is unknown, refuses its options, or would fail or do harm in training.
    """
    described = [_in_folder(callback, folder) for callback in experiment.config.training.callbacks]
    kinds = [keras_objects.find("callback", each.name) for each in described]
    for kind in (*kinds, *map(type, given)):
        _check_kind(experiment, kind)
    logs = _epoch_logs(experiment.model)
    for i, each in enumerate(described):
        # Callbacks of a user's own may add logs, for those that come after them.
        own = any(not kind.__module__.startswith("keras.") for kind in kinds[:i])
        monitor = each.options.get("monitor")
        added = {monitor: 0.5} if own and isinstance(monitor, str) else {}
        check_callback(each, added | logs)
    return [*(keras_objects.make("callback", each) for each in described), *given]


def _in_folder(callback: KerasObject, folder: Path) -> KerasObject:
    """Puts the run directory in place of "{run}", and refuses the files of the run itself."""
    options = {
        key: value.replace("{run}", str(folder)) if isinstance(value, str) else value
        for key, value in callback.options.items()
    }
    for key, value in options.items():
        if isinstance(value, str) and Run(folder).owns(Path(value)):
            raise InputError(f"callback {callback.name!r}: {key} = {value!r} is the run's own")
    return callback.model_copy(update={"options": options})


def _refuse_reserved(names: Iterable[str]) -> None:
    """Refuses names of metrics that would take the place of a number of our own."""
    taken = sorted(_RESERVED.intersection(names))
    if taken:
        raise InputError(
            f"training.metrics: {', '.join(taken)} is a name of our own: choose another"
        )


def _is_number(dtype: tf.DType) -> bool:
    return bool(dtype.is_floating or dtype.is_integer or dtype.is_bool)


def _epoch_logs(model: keras.Model) -> dict[str, Any]:
    """Returns logs such as a callback finds at the end of an epoch."""
    results = metric_tensors(model.get_metrics_result())
    values = {name: np.full(value.shape, 0.5) for name, value in results.items()}
    return {
        f"{split}{name}": value if value.ndim else 0.5
        for split in ("", "val_")
        for name, value in values.items()
    }


def _check_kind(experiment: Experiment, kind: type) -> None:
    """Refuses callbacks that lose a user's work or that act against a part of the workflow."""
    name = kind.__name__
    if issubclass(kind, keras.callbacks.BackupAndRestore):
        raise InputError(
            f"callback {name!r} removes its folder at the end, whatever is in it: checkpoints are "
            "written without it, and `trainer fit --resume` goes on from them"
        )
    if issubclass(kind, keras.callbacks.SwapEMAWeights):
        raise InputError(
            f"callback {name!r} is not needed: with use_ema, the averaged weights are scored and "
            "kept without it"
        )
    setters = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)
    schedule = experiment.config.optimizer.schedule
    if schedule is not None and issubclass(kind, setters):
        raise InputError(
            f"callback {name!r} sets the learning rate, and so does optimizer.schedule = "
            f"{schedule.name!r}: expected one of them (a file without optimizer.schedule)"
        )
