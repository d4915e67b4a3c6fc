"""Builds and checks an experiment from a configuration: devices, data, model and loop.

Parts that do not fit together are refused before anything is trained or written.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from pydantic import ValidationError

from trainer import data as datasets
from trainer import devices, keras_objects, models
from trainer.config import Config, explain_invalid
from trainer.data import Dataset, DataSpec, Split
from trainer.devices import Devices
from trainer.errors import InputError, did_you_mean, expect
from trainer.run import Run
from trainer.training import losses  # noqa: F401 - registers its class by name
from trainer.training.batches import Batches, make_batches, steps_per_epoch
from trainer.training.loop import Loop
from trainer.training.optimizer import make_optimizer, try_optimizer
from trainer.training.step import compute_loss, find_step, metric_tensors, train_step
from trainer.training.weights import load_weights

if TYPE_CHECKING:
    from trainer.cluster import Cluster
    from trainer.training.augmentation import Augmentation
    from trainer.training.initial_weights import InitialWeights

# Names that a metric must not have: logs, and results of `evaluate`, already contain them.
_IN_LOGS = {"epoch", "images_per_second", "learning_rate", "step", "step_ms", "step_ms_quartiles"}
_IN_RESULTS = {"data", "devices", "images", "precision", "run", "split"}
_RESERVED = {"gradient_norms", "loss", "outputs", "windows"} | _IN_LOGS | _IN_RESULTS


class PhaseTimer:
    """Seconds of each phase of a command."""

    def __init__(self, import_seconds: float | None = None) -> None:
        """Starts the timer; imports took `import_seconds` before, if they are known."""
        self.seconds: dict[str, float] = {}
        self.import_seconds = import_seconds
        self._start = time.perf_counter()

    def total(self) -> float:
        """Returns the seconds since the start, including imports."""
        return time.perf_counter() - self._start + (self.import_seconds or 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Experiment:
    """Everything that a training or an evaluation needs.

    Attributes:
        config: The configuration, with "auto" and the sample of mnist resolved.
        data: The splits and their description.
        devices: The selected devices.
        placed: The devices that the outputs were found on.
        model: Built and compiled.
        loop: Trains and evaluates the model.
        augmentation: Changes training images; None: no augmentation.
        initial: What was loaded with `training.init_from`; None: nothing.
    """

    config: Config
    data: Dataset
    devices: Devices
    placed: list[str]
    model: keras.Model
    loop: Loop
    augmentation: "Augmentation | None"
    initial: "InitialWeights | None" = None

    @property
    def random_state(self) -> list[Any]:
        """Variables of the augmentation."""
        return [] if self.augmentation is None else self.augmentation.variables

    def scored(self, split: str) -> Split:
        """Returns the images of a split to score; with `limit_batches`, a fixed sample of them."""
        training, images = self.config.training, self.data.split(split)
        if training.limit_batches is None:
            return images
        count = training.limit_batches * training.batch_size
        return images.sample(count, self.config.data.split_seed)

    def batches(self, split: str, *, shuffled: bool = False) -> Batches:
        """Returns the batches of a split.

        Args:
            split: "train", "validation" or "test".
            shuffled: Shuffle all images in each epoch; `limit_batches` takes the first batches.
                False: the images of `scored`, in their order.
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


def build_experiment(
    config: Config,
    timer: PhaseTimer,
    selected: Devices | None = None,
    *,
    cluster: "Cluster | None" = None,
    restored: Run | None = None,
    initialize: bool = True,
) -> Experiment:
    """Selects devices, loads data, builds and compiles the model, and checks that they fit.

    Args:
        config: The experiment.
        timer: Receives the seconds of each phase.
        selected: Devices to use in place of the configuration's.
        cluster: The workers that train together, each with the same configuration and data.
        restored: A finished run whose model is restored instead of building a new one.
        initialize: False: the weights of a checkpoint are loaded later, so no others are.

    Raises:
        InputError: Parts of the configuration do not fit together.
        MissingError: The requested device is missing.
        CheckError: The outputs are not on the requested device.
    """
    training = config.training
    with timer.phase("devices"):
        selected = selected or devices.select(
            training.device, cluster, cluster_timeout_seconds=training.cluster_timeout_seconds
        )
        precision = devices.choose_precision(training.precision, selected)
    models.find(config.model)  # before the data is loaded, which can include a download
    try_optimizer(config.optimizer)
    step = find_step(training.step) if restored is None else train_step
    with timer.phase("data"):
        data = datasets.load(config.data)
    if restored is not None:
        require_data(restored.name, spec_of(restored).fingerprint, data.spec)
    selected.require_same(config.flat() | {"the data itself": data.spec.fingerprint})
    with timer.phase("model"):
        keras.utils.set_random_seed(training.seed)
        if training.deterministic:
            tf.config.experimental.enable_op_determinism()
        with devices.dtype_policy(precision), selected.scope():
            model, augmentation, initial = _make_model(config, data, selected, restored, initialize)
        if initial is not None:
            config = config.with_changes({"training.init_from": initial.source})  # not "latest"
        placed = _check_forward(model, data, selected)
        config = _resolve(config, data.spec, model, selected, precision)
        loop = Loop(
            model,
            selected,
            step=step,
            steps_per_execution=training.steps_per_execution,
            clip_norm=training.clip_norm,
            jit_compile=bool(config.training.jit_compile),
            augment=augmentation,
            gradient_norms=config.logging.histograms,
            class_weight=_class_weight(training.class_weight, data),
        )
    return Experiment(config, data, selected, placed, model, loop, augmentation, initial)


def _make_model(
    config: Config, data: Dataset, selected: Devices, restored: Run | None, initialize: bool
) -> "tuple[keras.Model, Augmentation | None, InitialWeights | None]":
    """Returns the compiled model, the augmentation, and what `training.init_from` loaded."""
    if restored is not None:
        return restore(restored, selected, compiled=True), None, None
    source, initial = config.training.init_from if initialize else None, None
    model = compiled_model(config, data.spec, initialize=initialize and source is None)
    if source is not None:
        from trainer.training.initial_weights import load_initial_weights

        initial = load_initial_weights(model, source, config.logging.directory)
    return model, _make_augmentation(config, data), initial


def compiled_model(config: Config, spec: DataSpec, *, initialize: bool = True) -> keras.Model:
    """Builds and compiles the model of a configuration; InputError if a name or option is wrong."""
    training = config.training
    model = models.build(config.model, spec, initialize=initialize)
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        # Statistics of the whole batch, not of the part of each device, as on one device.
        for layer in keras_objects.nested_layers(model.layers):
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
    metrics = [keras_objects.make("metric", metric) for metric in training.metrics]
    _refuse_reserved({metric.name for metric in metrics})
    one_hot = keras.metrics.CategoricalAccuracy, keras.metrics.TopKCategoricalAccuracy
    for metric in metrics:  # Keras would compare the labels with nothing, without an error
        name = f"Sparse{type(metric).__name__}"
        expect(not isinstance(metric, one_hot), "training.metrics", name, type(metric).__name__)
    steps = steps_per_epoch(spec.train, training.batch_size, training.limit_batches)
    model.compile(
        optimizer=make_optimizer(config.optimizer, steps * training.epochs),
        loss=keras_objects.make("loss", training.loss),
        metrics=metrics,
        jit_compile=training.jit_compile,
    )
    return model


def _make_augmentation(config: Config, data: Dataset) -> "Augmentation | None":
    if not config.data.augmentation:
        return None
    from trainer.training.augmentation import make_augmentation

    return make_augmentation(config.data.augmentation, data)


def _class_weight(weights: str | dict[str, float] | None, data: Dataset) -> list[float] | None:
    """Returns the weight of each class in the order of the labels; None: all have the same."""
    if weights is None:
        return None
    names = data.spec.class_names
    if not isinstance(weights, dict):
        counts = data.train.class_counts(len(names))
        return [len(data.train) / (len(names) * max(1, count)) for count in counts]
    for name in weights:
        if name not in names:
            raise InputError(f"training.class_weight: {did_you_mean(name, names)}")
    return [weights.get(name, 1.0) for name in names]


def _resolve(
    config: Config, spec: DataSpec, model: keras.Model, selected: Devices, precision: str
) -> Config:
    """Returns the configuration without "auto" and fallbacks."""
    jit_compile = config.training.jit_compile
    if jit_compile == "auto":
        # On one GPU as in Keras: model.compile has set it to True if every layer can be compiled.
        # On other devices off (docs/performance.md).
        jit_compile = selected.type == "GPU" and selected.replicas == 1 and bool(model.jit_compile)
    if not jit_compile:
        model.jit_compile = False  # also for Keras's own fit() and evaluate()
    resolved: dict[str, Any] = {
        "data": config.data.resolved(datasets.find(config.data)).model_dump(),
        "model": config.model.resolved(models.find(config.model)).model_dump(),
        "training.precision": precision,
        "training.jit_compile": jit_compile,
    }
    if spec.name == "mnist_sample":
        resolved["data.name"] = spec.name  # `evaluate` must load the same data later
    return config.with_changes(resolved)


def _check_forward(model: keras.Model, data: Dataset, selected: Devices) -> list[str]:
    """Sends a few images through model, loss and metrics, and checks the results.

    Returns:
        The devices that the outputs were found on.

    Raises:
        InputError: The data, the loss or a metric does not fit the model.
        CheckError: The outputs are not on the requested devices.
    """
    # Not as many images as classes, so that no loss fits only by broadcasting.
    images, labels = data.train.read(slice(4 if data.spec.class_count == 3 else 3))
    what = "the model cannot be run on images of the data"
    logging.disable(logging.WARNING)  # TensorFlow warns that strategy.run is slow outside a graph
    try:
        with selected.scope():
            results = selected.strategy.run(lambda: model(images, training=False))
            outputs = selected.strategy.experimental_local_results(results)
            what = (
                "training.loss or training.metrics does not fit: expected one that accepts labels "
                f"(int [n]) and probabilities (float [n, {data.spec.class_count}])"
            )
            loss = compute_loss(model, images, labels, outputs[0], None, training=False)
            model.compute_metrics(images, labels, outputs[0])
            logs = metric_tensors(model.get_metrics_result())
            model.reset_metrics()
    except keras_objects.KERAS_ERRORS as error:
        raise InputError(f"{what}: {keras_objects.explain(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    placed = devices.check_placement(outputs, selected)
    _refuse_reserved(logs.keys() - {"loss"})
    for metric in keras_objects.compiled_metrics(model):
        if isinstance(result := metric.result(), dict):  # a key "loss" would replace the loss
            _refuse_reserved({*metric_tensors(result)})
    sums = outputs[0].numpy().sum(axis=1)
    expected = "probabilities, each row with the sum 1 (does it end in a softmax?)"
    received = f"sums of {sums.round(3).tolist()}"
    expect(np.allclose(sums, 1, atol=0.01), "the output of the model", expected, received)
    received = f"shape {list(loss.shape)}: its reduction is 'none'"
    expect(loss.shape == (), "training.loss", "one number for a batch", received)
    return placed


def restore(
    run: Run,
    selected: Devices | None = None,
    *,
    precision: str | None = None,
    compiled: bool = False,
) -> keras.Model:
    """Builds the model of a finished run with its weights.

    Args:
        run: A finished run.
        selected: Devices that hold the model; None: the default device.
        precision: Precision of the model; None: the precision it was trained with.
        compiled: Also restore loss, metrics and the optimizer with its state. False: only the
            module of `trainer/models` is needed.

    Raises:
        InputError: The run is damaged, or its model cannot be built any more.
    """
    config, spec = run.config(), spec_of(run)
    policy = devices.dtype_policy(precision or config.training.precision)
    try:
        with policy, nullcontext() if selected is None else selected.scope():
            if compiled:
                model = compiled_model(config, spec, initialize=False)
                model.optimizer.build(model.trainable_variables)
            else:
                model = models.build(config.model, spec, initialize=False)
    except InputError as error:
        raise InputError(f"run {run.name} cannot be restored: {error}") from error
    load_weights(run.final_weights(), model)
    return model


def spec_of(run: Run) -> DataSpec:
    """Returns the description of the data of a finished run; InputError if it is damaged."""
    try:
        return DataSpec.model_validate(run.read_json("summary.json").get("data"))
    except ValidationError as error:
        where = f"{run.path / 'summary.json'} is damaged: data"
        raise InputError(explain_invalid(error, where)) from None


def require_data(name: str, expected: str | None, found: DataSpec) -> None:
    """Raises InputError if data has another fingerprint than the data a model was trained on."""
    what = f"the data differs from the data that {name} was trained on"
    received = f"{found.fingerprint} ({found.origin})"
    expect(found.fingerprint == expected, what, f"fingerprint {expected}", received)


def _refuse_reserved(names: set[str]) -> None:
    taken = sorted(name for name in names if name in _RESERVED or name.startswith("val_"))
    if taken:
        raise InputError(f"training.metrics: {', '.join(taken)} is reserved: choose another name")
