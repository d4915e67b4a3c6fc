"""The training loop: epochs, calls, validation, callbacks, and the time of each part.

A call runs many steps in one graph. The host and the device synchronize once per call. Then the
loop reads the logs and runs callbacks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.devices import Devices
from trainer.errors import CheckError, InputError
from trainer.keras_objects import KERAS_ERRORS, explain, raised_in_keras_callback
from trainer.tensorflow_internals import profiler_step
from trainer.training.batches import Batches
from trainer.training.call import Call, Logs
from trainer.training.step import bind_step, require_addable, test_step, train_step


@dataclass(frozen=True)
class Progress:
    """Position of a training between two calls."""

    epoch: int = 0  # counted from 0
    step: int = 0  # completed steps of the epoch; if all are completed, the validation is next
    logs: Logs = field(default_factory=dict)  # loss and metrics since the start of the epoch


@dataclass(frozen=True)
class CallRecord:
    """The steps of one call.

    `metrics` are the values after each step, over the epoch so far. They are empty with several
    workers, because reading a metric needs communication.
    """

    epoch: int  #: counted from 0
    first_step: int  #: counted from 0 over the whole run
    steps: int
    images: int
    seconds: float  #: the device is idle at the start and has finished at the end
    worker_seconds: NDArray[np.float64]  #: of each worker of a cluster, [workers]
    warm: bool  #: False for the first calls, which set up kernels or are traced by the profiler
    loss: NDArray[np.float32]  #: of the batch of each step, [steps]
    learning_rate: NDArray[np.float32]  #: [steps]
    metrics: dict[str, NDArray[np.float32]]  #: each [steps]
    gradient_norms: NDArray[np.float32] | None  #: [steps, weights]
    logs: Logs  #: loss and metrics since the start of the epoch, as Keras passes them to callbacks


@dataclass
class Seconds:
    """Seconds that the loop spent on each part."""

    tracing: float = 0.0  # building and optimizing the graphs
    training: float = 0.0  # running steps
    validation: float = 0.0  # scoring the validation images, once per epoch
    callbacks: float = 0.0  # except those of the validation


class Loop:
    """Trains and evaluates a compiled model on its devices.

    Attributes:
        augment: Changes training images; None: no augmentation.
        seconds: Time of each part.
        step_graph: The graph of one training step; None until it is traced.
    """

    def __init__(
        self,
        model: keras.Model,
        devices: Devices,
        *,
        step: Callable[..., Any] = train_step,
        steps_per_execution: int = 50,
        clip_norm: float | None = None,
        jit_compile: bool = False,
        augment: Callable[[tf.Tensor], tf.Tensor] | None = None,
        gradient_norms: bool = False,
        class_weight: Sequence[float] | None = None,
    ) -> None:
        """Prepares the loop.

        Args:
            model: Built and compiled inside the scope of the devices.
            devices: One device or several.
            step: Trains the model on one batch; see `trainer.training.step`.
            steps_per_execution: Largest number of steps in one call.
            clip_norm: Largest global norm of the gradients, or None.
            jit_compile: Compile the step with XLA. The augmentation is not compiled, because three
                of Keras's augmentation layers have no XLA kernel.
            augment: Changes training images, uint8 [rows, H, W, C], same shape returned.
            gradient_norms: Record the norm of each weight's gradient, if the step returns it.
            class_weight: Weight of the images of each class in the training loss; None: all 1.

        Raises:
            InputError: The step does not fit the model and the options, or the results of several
                devices cannot be added up.
        """
        self.model, self.devices, self.augment = model, devices, augment
        self.steps_per_execution = steps_per_execution
        self.seconds = Seconds()
        self.step_graph: tf.Graph | None = None
        self._jit_compile, self._class_weight = jit_compile, class_weight
        self._calls: dict[tuple[str, Batches], tuple[list[Any], Call]] = {}
        self._calls_run, self._warmup_calls, self._epochs = 0, 1, 0
        self._build()
        options = {"clip_norm": clip_norm, "gradient_norms": gradient_norms}
        self._step = bind_step(
            step, model, replicas=devices.replicas, weighted=class_weight is not None, **options
        )

    def fit(
        self,
        train: Batches,
        validation: Batches | None = None,
        *,
        epochs: int,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        warmup_calls: int = 1,
        start: Progress | None = None,
    ) -> dict[str, list[float]]:
        """Trains the model.

        Args:
            train: Batches to train on.
            validation: Batches to score after each epoch; their metrics are named `val_...`.
            epochs: Number of passes over `train`.
            callbacks: Keras callbacks. Their batch methods run once per call, as in Keras with
                `steps_per_execution`. A method `on_call_end(record)` receives each `CallRecord`
                after all `on_train_batch_end`.
            warmup_calls: Number of first calls whose records are not `warm`.
            start: Position to continue from. A callback must restore the state of the training.

        Returns:
            The value of each metric after each epoch, by name.

        Raises:
            InputError: A callback of Keras fails: its file or an option is wrong.
            CheckError: The loss is infinite or NaN; the message names the step.
        """
        model, facts = self.model, {"epochs": epochs, "steps": train.steps, "verbose": 0}
        hooks = keras.callbacks.CallbackList([*callbacks], add_history=True, model=model, **facts)
        model.stop_training = False
        self._calls_run, self._warmup_calls, self._epochs = 0, warmup_calls, epochs
        self._timed("callbacks", hooks.on_train_begin)
        try:
            logs = self._train(train, validation, hooks, start or Progress())
        except CheckError:
            self._timed("callbacks", hooks.on_train_end)  # so that callbacks can close their files
            raise
        # Optimizers with `use_ema` replace the weights by the averaged weights here.
        model.optimizer.finalize_variable_values(model.trainable_variables)
        self._timed("callbacks", hooks.on_train_end, logs)
        return dict(model.history.history)

    def evaluate(
        self,
        batches: Batches,
        *,
        collect: bool = False,
        callbacks: keras.callbacks.CallbackList | None = None,
    ) -> tuple[Logs, NDArray[np.float32] | None]:
        """Scores every image once, and calls the `on_test_...` methods of callbacks.

        Returns:
            Loss and metrics. If `collect` is set, also the probabilities in the order of the
            batches, float32 [images, classes].
        """
        hooks, logs = callbacks or keras.callbacks.CallbackList(), dict[str, Any]()
        outputs: list[NDArray[np.float32]] = []
        self.model.stop_evaluating = False
        hooks.on_test_begin()
        call = self.trace(batches, "collect" if collect else "evaluate")
        self.model.reset_metrics()
        state = batches.start_epoch(0)
        for first in range(0, batches.steps, self.steps_per_execution):
            count = min(self.steps_per_execution, batches.steps - first)
            hooks.on_test_batch_begin(first)
            rows, metrics, probabilities = call(state, first, count)
            _, logs = call.read(rows, metrics)
            if probabilities is not None:
                outputs.append(probabilities.numpy())
            hooks.on_test_batch_end(first + count - 1, logs)
            if self.model.stop_evaluating:
                break
        hooks.on_test_end(logs)
        return logs, np.concatenate(outputs) if collect else None

    def trace(self, batches: Batches, kind: str = "train") -> Call:
        """Returns a traced call. It is traced again if an object that it depends on was replaced.

        As in Keras, `make_train_function(force=True)` requests this after other changes. The kinds
        are "train", "evaluate", and "collect": evaluate and return the probabilities.
        """
        model = self.model
        function = model.train_function if kind == "train" else model.test_function
        parts = [model.optimizer, model.loss, function, *model.metrics, *model.trainable_variables]
        traced_for, call = self._calls.get((kind, batches), ([], None))
        if call is None or list(map(id, traced_for)) != list(map(id, parts)):
            self._build()
            call = self._timed("tracing", self._trace, kind, batches)
            self._calls[kind, batches] = parts, call
        return call

    def _train(
        self,
        train: Batches,
        validation: Batches | None,
        hooks: keras.callbacks.CallbackList,
        start: Progress,
    ) -> Logs:
        """Trains all epochs from a position; returns the logs of the last one."""
        model, logs = self.model, dict[str, Any]()
        # A training that a callback has stopped does not begin another epoch when it is resumed.
        if model.stop_training and start.epoch and not start.step:
            return logs
        for epoch in range(start.epoch, self._epochs):
            progress = start if epoch == start.epoch else Progress(epoch)
            if progress.step == 0:
                model.reset_metrics()
                self._timed("callbacks", hooks.on_epoch_begin, epoch)
            logs = self._train_epoch(train, progress, hooks)
            if validation is not None:
                evaluate = partial(self.evaluate, validation, callbacks=hooks)
                scores, _ = self._timed("validation", evaluate)
                # If it is not finite, the last update of the epoch is the cause.
                self._require_finite(scores["loss"], epoch, (epoch + 1) * train.steps)
                logs |= {f"val_{name}": value for name, value in scores.items()}
            self._timed("callbacks", hooks.on_epoch_end, epoch, logs)
            if model.stop_training:
                break
        return logs

    def _train_epoch(
        self, train: Batches, progress: Progress, hooks: keras.callbacks.CallbackList
    ) -> Logs:
        """Trains one epoch from a position; returns its logs."""
        epoch, logs = progress.epoch, dict(progress.logs)
        state = train.start_epoch(epoch, progress.step)
        for first in range(progress.step, train.steps, self.steps_per_execution):
            if first and self.model.stop_training:  # the first call always runs, as in Keras
                break
            count = min(self.steps_per_execution, train.steps - first)
            self._timed("callbacks", hooks.on_train_batch_begin, first)
            record = self.run_call(train, state, epoch, first, count)
            logs = dict(record.logs)
            self._timed("callbacks", hooks.on_train_batch_end, first + count - 1, logs)
            for callback in hooks.callbacks:
                if hasattr(callback, "on_call_end"):
                    self._timed("callbacks", callback.on_call_end, record)
            for step, loss in enumerate(record.loss, record.first_step + 1):
                self._require_finite(loss, epoch, step)
        return logs

    def _require_finite(self, loss: float, epoch: int, step: int) -> None:
        if not np.isfinite(loss):
            where = f"at step {step} (epoch {epoch + 1} of {self._epochs})"
            advice = "lower optimizer.learning_rate, or set training.clip_norm"
            raise CheckError(f"the loss became {loss} {where}: {advice}")

    def run_call(
        self, train: Batches, state: Any, epoch: int, first: int, count: int
    ) -> CallRecord:
        """Runs `count` steps from step `first` of an epoch, and waits for the device.

        `state` is the result of `train.start_epoch`. Raises InputError if XLA refuses the step.
        """
        call = self.trace(train)
        start = time.perf_counter()
        try:
            with profiler_step(first):
                rows, metrics, _ = call(state, first, count)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            if self._jit_compile:
                from trainer.kernel_internals import explain_xla_error

                explain_xla_error(error, self)
            raise
        for name in self.devices.names:
            with tf.device(name):
                tf.raw_ops.SyncDevice()
        seconds = time.perf_counter() - start
        self.seconds.training += seconds
        self._calls_run += 1
        values, logs = call.read(rows, metrics)
        curves = {name: value for name, value in values.items() if value.ndim == 1}
        return CallRecord(
            epoch=epoch,
            first_step=epoch * train.steps + first,
            steps=count,
            images=min(train.images - first * train.batch_size, count * train.batch_size),
            seconds=seconds,
            worker_seconds=self.devices.all_gather([seconds])[:, 0],
            warm=self._calls_run > self._warmup_calls,
            loss=curves.pop("loss"),
            learning_rate=curves.pop("learning_rate"),
            gradient_norms=values.get("gradient_norms"),
            metrics=curves,
            logs=logs,
        )

    def _trace(self, kind: str, batches: Batches) -> Call:
        def update(images: tf.Tensor, labels: tf.Tensor, fraction: Any) -> Any:
            self.step_graph = images.graph  # the graph of one step, without the loop over steps
            weights = self._class_weight and tf.gather(tf.constant(self._class_weight), labels)
            return self._step(images, labels, weights, fraction)

        if kind == "train" and self._jit_compile:
            update = tf.function(update, jit_compile=True, autograph=False)

        def step(state: Any, number: tf.Tensor) -> dict[str, tf.Tensor]:
            with tf.name_scope("batch"):
                local = batches.local_batch(state, number)
            images, labels = local.images, local.labels
            if kind != "train":
                values = test_step(self.model, images, labels, batch_fraction=local.fraction)
                outputs = values.pop("outputs")
                if kind == "collect":
                    values["outputs"] = batches.join(local, outputs)
                return values
            if self.augment is not None:
                with tf.name_scope("augment"):
                    images = self.augment(images)
            return dict(update(images, labels, local.fraction))

        return Call(self.model, self.devices, batches, step, kind)

    def _build(self) -> None:
        """Checks the model, and creates variables of the optimizer and metrics after a `compile`.

        Keras would create them at their first use. This is inside the graph of one replica, where a
        strategy cannot create variables.
        """
        model = self.model
        with self.devices.scope():
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
            if not all(getattr(metric, "built", True) for metric in model.metrics):
                shapes = [(1, *shape[1:]) for shape in (model.input_shape, model.output_shape)]
                model.compute_metrics(tf.zeros(shapes[0]), tf.zeros((1,)), tf.zeros(shapes[1]))
                model.reset_metrics()
        if self.devices.replicas > 1:
            require_addable(model, jit_compile=self._jit_compile)

    def _timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function and adds its seconds to a part, without seconds counted inside it."""
        seconds = vars(self.seconds)
        start, before = time.perf_counter(), sum(seconds.values())
        try:
            return function(*arguments)
        except KERAS_ERRORS as error:
            if raised_in_keras_callback(error):
                raise InputError(f"a callback failed: {explain(error)}") from error
            raise
        finally:
            counted_inside = sum(seconds.values()) - before
            seconds[part] += time.perf_counter() - start - counted_inside
