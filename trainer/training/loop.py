"""The loop: epochs, calls of many steps, validation, Keras callbacks, and the clock.

A call is one execution of a compiled function that runs the step many times, so that Python costs
nothing between steps. The host and the device meet once a call: there logs are read, callbacks run
and the clock is looked at.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.devices import Devices
from trainer.errors import CheckError, InputError
from trainer.keras_objects import nested_layers
from trainer.tensorflow_internals import (
    HostOperation,
    KernelReport,
    check_kernels,
    check_xla,
    profiler_step,
    xla_refusal,
)
from trainer.training.averaging import simple_optimizers
from trainer.training.batches import Batches, LocalBatch
from trainer.training.step import compute_loss, overrides, test_step, train_step

# What Keras gives to callbacks: floats, and arrays where a metric has several values.
Logs = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a training stands, between two calls.

    Attributes:
        epoch: Counted from 0.
        step: Steps of the epoch that are done. All of them: its validation is to come.
        logs: Loss and metrics since the epoch began.
    """

    epoch: int = 0
    step: int = 0
    logs: Logs = field(default_factory=dict)


@dataclass(frozen=True)
class CallRecord:
    """The steps of one call, with the device waited for at both ends.

    Attributes:
        epoch: Counted from 0.
        first_step: Step of the run (counted from 0) at which the call began.
        steps: Steps in the call.
        images: Images in the call.
        seconds: From the start of the call until the device had finished it.
        worker_seconds: The same of each worker of a cluster, float64 [workers].
        warm: False for the first call of a run, which also sets up the device's kernels, and for
            those that a profiler traced: such a window is no measurement of the step.
        loss: Loss of each step's batch, float32 [steps].
        learning_rate: Of each step, float32 [steps].
        metrics: Each metric after each step, since the epoch began, float32 [steps]. By several
            workers, who must exchange their parts to know it, after the last step alone: [1].
        gradient_norms: float32 [steps, weights], or None where they were not asked for.
        logs: Loss and metrics since the epoch began, as Keras gives them to callbacks.
    """

    epoch: int
    first_step: int
    steps: int
    images: int
    seconds: float
    worker_seconds: NDArray[np.float64]
    warm: bool
    loss: NDArray[np.float32]
    learning_rate: NDArray[np.float32]
    metrics: dict[str, NDArray[np.float32]]
    gradient_norms: NDArray[np.float32] | None
    logs: Logs


@dataclass
class Seconds:
    """Where the time of the loop went.

    Attributes:
        tracing: Building and optimising the graphs.
        training: Running steps.
        validation: Scoring the validation images, once an epoch.
        callbacks: Running Keras callbacks and observers (logging among them).
    """

    tracing: float = 0.0
    training: float = 0.0
    validation: float = 0.0
    callbacks: float = 0.0


class Loop:
    """Trains and evaluates a compiled model on its devices."""

    def __init__(
        self,
        model: keras.Model,
        devices: Devices,
        *,
        steps_per_execution: int = 50,
        clip_norm: float | None = None,
        jit_compile: bool = False,
        augment: Callable[[tf.Tensor], tf.Tensor] | None = None,
        gradient_norms: bool = False,
    ) -> None:
        """Prepares the loop.

        Args:
            model: Built and compiled inside the scope of the devices.
            devices: One device or several.
            steps_per_execution: The most steps in one call.
            clip_norm: Largest global norm of the gradients, or None; not for a model with a
                `train_step` of its own.
            jit_compile: Compile the step with XLA. Choosing, gathering and augmenting the images is
                left out: three of Keras's augmentation layers have no XLA kernel.
            augment: Alters training images, uint8 [rows, H, W, C] to the same.
            gradient_norms: Record the norm of each weight's gradient at each step; a `train_step`
                of the model's own does not give them.

        Raises:
            InputError: There are several devices, and what each computes cannot be added up; or
                `clip_norm` is given to a model with a `train_step` of its own.
        """
        self.model = model
        self.devices = devices
        self.strategy = devices.strategy
        self.steps_per_execution = steps_per_execution
        self.seconds = Seconds()
        self.step_graph: tf.Graph | None = None
        self._traced: Any = None
        self._traced_for: list[Any] = []
        self._calls, self._warmup_calls = 0, 1
        self._augment = augment
        self._jit_compile = jit_compile
        self._own_train_step = overrides(model, "train_step")
        self._own_test_step = overrides(model, "test_step")
        if self._own_train_step and clip_norm is not None:
            raise InputError("training.clip_norm: expected a model without a train_step of its own")
        self._clip_norm = clip_norm
        self._gradient_norms = gradient_norms and not self._own_train_step
        self._several_workers = devices.workers > 1
        self._evaluations: dict[tuple[int, bool], tuple[Batches, list[Any], Any]] = {}
        self._optimizer: Any = None
        self._optimized: list[Any] = []
        self._metrics: list[Any] = []
        for method in ("make_train_function", "make_test_function"):
            if overrides(model, method):
                raise InputError(f"a model with its own {method}: expected train_step or test_step")
        if devices.replicas > 1:
            _refuse_on_several_devices(model, jit_compile=jit_compile)
        self._build()

    def _build(self) -> None:
        """Creates the variables of optimizer and metrics, and those of a new one after `compile`.

        Keras creates them at their first use. That would be inside the graph of one replica, where
        a strategy cannot create variables.

        Raises:
            InputError: A weight is to be trained that the optimizer has no state for.
        """
        model = self.model
        trained = model.trainable_variables
        with self.devices.scope():
            if self._optimizer is not model.optimizer:
                model.optimizer.build(trained)
                self._optimizer, self._optimized = model.optimizer, list(trained)
            compiled = not _same(model.metrics, self._metrics)
            if compiled:
                shapes = [(1, *shape[1:]) for shape in (model.input_shape, model.output_shape)]
                model.compute_metrics(tf.zeros(shapes[0]), tf.zeros((1,)), tf.zeros(shapes[1]))
                model.reset_metrics()
                self._metrics = model.metrics
        if compiled and self.devices.replicas > 1:
            _require_a_mean(model, self.devices)
        known = {id(variable) for variable in self._optimized}
        unknown = [variable.path for variable in trained if id(variable) not in known]
        if unknown:
            raise InputError(
                f"the optimizer has no state for {', '.join(unknown)}: it was not trainable when "
                "training began; call model.compile with a new optimizer to train it"
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
            validation: Batches scored after each epoch; their metrics are named `val_...`.
            epochs: How often to go through `train`.
            callbacks: Keras callbacks. Their batch methods run once a call, as Keras runs them
                under `steps_per_execution`. After it, `on_call_end(record)` is called if the
                callback has this method.
            warmup_calls: How many calls at the start are no measurement of the step.
            start: Where an earlier process left off; a callback restores the state that belongs to
                it when training begins.

        Returns:
            The value of each metric after each epoch, by name.

        Raises:
            InputError: A callback cannot write its file.
            CheckError: The loss became infinite or no number; the message names the step.
        """
        model = self.model
        callback_list = keras.callbacks.CallbackList(
            list(callbacks),
            add_history=True,
            model=model,
            epochs=epochs,
            steps=train.steps,
            verbose=0,
        )
        model.stop_training = False
        self._calls, self._warmup_calls = 0, warmup_calls
        try:
            self._timed("callbacks", callback_list.on_train_begin)
        except OSError as error:
            raise InputError(f"a callback cannot write: {error}") from None
        start = start or Progress()
        # A training that a callback had stopped does not begin another epoch when it is resumed.
        stopped = model.stop_training and start != Progress() and start.step == 0
        logs: Logs = {}
        diverged, epoch = None, start.epoch
        for epoch in range(start.epoch, start.epoch if stopped else epochs):
            progress = start if epoch == start.epoch else Progress(epoch)
            if progress.step == 0:
                model.reset_metrics()
                self._timed("callbacks", callback_list.on_epoch_begin, epoch)
            logs, diverged = self._epoch(train, progress, callback_list)
            if diverged is not None:
                break
            if validation is not None:
                scores = self._validate(validation, callback_list)
                if not np.isfinite(scores["loss"]):  # the last update of the epoch did it
                    diverged = ((epoch + 1) * train.steps, scores["loss"])
                    break
                logs |= {f"val_{name}": value for name, value in scores.items()}
            self._timed("callbacks", callback_list.on_epoch_end, epoch, logs)
            if model.stop_training:
                break
        # For optimizers that average the weights: the average takes their place.
        model.optimizer.finalize_variable_values(self._optimized)
        self._timed("callbacks", callback_list.on_train_end, logs)
        if diverged is not None:
            raise CheckError(
                f"the loss became {diverged[1]} at step {diverged[0]} (epoch {epoch + 1} of "
                f"{epochs}): lower optimizer.learning_rate, or set training.clip_norm"
            )
        history: dict[str, list[float]] = model.history.history
        return history

    def trace(self, train: Batches) -> Any:
        """Builds the graph of a call of training steps; `fit` and `repeat` do so themselves.

        Args:
            train: Batches to train on.

        Returns:
            A concrete function.
        """
        self._build()
        self._traced = self._timed("tracing", self._trace_training, train)
        self._traced_for = [train, *self._depends_on("train_function")]
        return self._traced

    def _depends_on(self, function: str) -> list[Any]:
        """Returns the objects that a traced graph depends on and that callbacks may replace.

        Args:
            function: "train_function" or "test_function": Keras's `make_train_function(force=True)`
                and `make_test_function(force=True)` ask for a new graph.
        """
        model = self.model
        schedules = [_schedule(optimizer) for optimizer in simple_optimizers(model.optimizer)]
        objects = [model.optimizer, model.loss, getattr(model, function), *model.metrics]
        # Of batch normalization without weights, only the flag shows whether it is frozen.
        trainable = [layer.trainable for layer in nested_layers(model.layers)]
        return [*objects, *schedules, *model.trainable_variables, *trainable]

    def _training_call(self, train: Batches) -> Any:
        """Returns the traced call, traced again if a callback changed what it depends on."""
        now = [train, *self._depends_on("train_function")]
        return self._traced if _same(now, self._traced_for) else self.trace(train)

    def _evaluation_call(self, batches: Batches, collect: bool) -> Any:
        """Returns the traced call that scores, traced again as above."""
        now = self._depends_on("test_function")
        kept, traced_for, call = self._evaluations.get((id(batches), collect), (None, [], None))
        if kept is None or not _same(now, traced_for):
            self._build()
            call = self._timed("tracing", self._trace_evaluation, batches, collect)
            # Keeping the batches prevents that another object gets their id.
            self._evaluations[id(batches), collect] = (
                batches,
                self._depends_on("test_function"),
                call,
            )
        return call

    def check_kernels(self, device_type: str | None = None) -> KernelReport:
        """Looks for operations of the traced training step that run on the CPU.

        Args:
            device_type: "GPU" or "CPU"; None: the type of the devices in use.
        """
        return check_kernels(
            self._traced.graph,
            device_type or self.devices.type,
            layers=self.layer_names,
            traced_on=self.devices.names if self.devices.replicas > 1 else (),
        )

    def check_xla_kernels(self) -> tuple[HostOperation, ...]:
        """Returns the operations of the traced training step that XLA has no GPU kernel for."""
        return check_xla(self.step_graph, self.layer_names)

    def repeat(self, train: Batches, steps: int) -> Iterator[CallRecord]:
        """Trains without end, and without validation and callbacks: what a benchmark measures.

        Args:
            train: Batches to train on.
            steps: In each call; at most those of an epoch.

        Yields:
            What each call recorded, as `fit` gives it to its observers.
        """
        for epoch in itertools.count():
            state = train.start_epoch(epoch)
            for first in range(0, train.steps - steps + 1, steps):
                yield self._run_call(train, state, epoch, first, steps)

    def evaluate(
        self,
        batches: Batches,
        *,
        collect: bool = False,
        callbacks: keras.callbacks.CallbackList | None = None,
        between: Callable[[], None] | None = None,
    ) -> tuple[Logs, NDArray[np.float32] | None]:
        """Scores every image once.

        Args:
            batches: What to score.
            collect: Also return the probabilities, in the order of the batches.
            callbacks: Get Keras's test methods.
            between: Called between two calls of the device.

        Returns:
            Loss and metrics, and float32 [images, classes] where `collect` is set.
        """
        self.model.stop_evaluating = False
        if callbacks is not None:
            callbacks.on_test_begin()
        call = self._evaluation_call(batches, collect)
        self.model.reset_metrics()
        state = batches.start_epoch(0)
        outputs, logs = [], {}
        for first in range(0, batches.steps, self.steps_per_execution):
            count = min(self.steps_per_execution, batches.steps - first)
            if callbacks is not None:
                callbacks.on_test_batch_begin(first)
            probabilities, results = self._run(call, state, first, count)
            logs = _as_logs(results)
            if collect:
                outputs.append(probabilities.numpy())
            if callbacks is not None:
                callbacks.on_test_batch_end(first + count - 1, logs)
            if between is not None:
                between()
            if self.model.stop_evaluating:
                break
        logs |= self._metrics_now(logs)
        if callbacks is not None:
            callbacks.on_test_end(logs)
        return logs, np.concatenate(outputs) if collect else None

    def _epoch(
        self,
        train: Batches,
        progress: Progress,
        callbacks: keras.callbacks.CallbackList,
    ) -> tuple[Logs, tuple[int, float] | None]:
        """Trains one epoch; returns its logs, and the step and value of a loss that diverged."""
        epoch, logs = progress.epoch, dict(progress.logs)
        state = train.start_epoch(epoch, progress.step)
        for first in range(progress.step, train.steps, self.steps_per_execution):
            if first and self.model.stop_training:  # the first call always runs, as in Keras
                break
            count = min(self.steps_per_execution, train.steps - first)
            self._timed("callbacks", callbacks.on_train_batch_begin, first)
            record = self._run_call(train, state, epoch, first, count)
            logs = dict(record.logs)
            self._timed("callbacks", callbacks.on_train_batch_end, first + count - 1, logs)
            for callback in callbacks.callbacks:
                if hasattr(callback, "on_call_end"):
                    self._timed("callbacks", callback.on_call_end, record)
            bad = np.flatnonzero(~np.isfinite(record.loss))
            if len(bad):
                return logs, (record.first_step + int(bad[0]) + 1, float(record.loss[bad[0]]))
            if first + count == train.steps or self.model.stop_training:
                logs |= self._metrics_now(logs)
        return logs, None

    def _metrics_now(self, logs: Logs) -> Logs:
        """Returns the values of the metrics after the callbacks of the last call, as Keras does.

        Several workers read them together inside the call alone; logs of other names come from a
        step of the model's own.
        """
        if self._several_workers:
            return {}
        with self.devices.scope():
            results = metric_tensors(self.model.get_metrics_result())
        return _as_logs(results) if results.keys() == logs.keys() else {}

    def _run_call(
        self, train: Batches, state: Any, epoch: int, first: int, count: int
    ) -> CallRecord:
        """Runs `count` steps and waits for the device."""
        call = self._training_call(train)
        start = time.perf_counter()
        # The mark by which the profiler's pages count steps; it costs nothing unless one listens.
        with profiler_step(first):
            recorded, logs = self._run(call, state, first, count)
        for name in self.devices.names:
            with tf.device(name):
                tf.raw_ops.SyncDevice()
        seconds = time.perf_counter() - start
        self.seconds.training += seconds
        self._calls += 1
        values = {name: value.numpy() for name, value in recorded.items()}
        return CallRecord(
            epoch=epoch,
            first_step=epoch * train.steps + first,
            steps=count,
            images=min(train.images - first * train.batch_size, count * train.batch_size),
            seconds=seconds,
            worker_seconds=self.devices.all_gather([seconds])[:, 0],
            warm=self._calls > self._warmup_calls,
            loss=values.pop("loss"),
            learning_rate=values.pop("learning_rate"),
            gradient_norms=values.pop("gradient_norms", None),
            metrics=values,
            logs=_as_logs(logs),
        )

    def _validate(self, batches: Batches, callbacks: keras.callbacks.CallbackList) -> Logs:
        tracing, start = self.seconds.tracing, time.perf_counter()
        logs, _ = self.evaluate(batches, callbacks=callbacks)
        traced = self.seconds.tracing - tracing
        self.seconds.validation += time.perf_counter() - start - traced
        return logs

    def _trace_training(self, train: Batches) -> Any:
        """Builds the graph of a call: as many steps as its argument says."""

        def step(images: tf.Tensor, labels: tf.Tensor, batch_fraction: Any) -> dict[str, Any]:
            self.step_graph = images.graph  # what TensorBoard draws: the step, without the loop
            if self._own_train_step:
                logs = metric_tensors(self.model.train_step((images, labels)))
                return {"loss": logs.get("loss"), "logs": logs}
            return train_step(
                self.model,
                images,
                labels,
                batch_fraction=batch_fraction,
                clip_norm=self._clip_norm,
                gradient_norms=self._gradient_norms,
            )

        compiled_step = tf.function(step, jit_compile=True) if self._jit_compile else step

        def one_replica(batch: Any) -> dict[str, Any]:
            local, batch_fraction = self._local_batch(train, batch)
            images = local.images
            if self._augment is not None:
                with tf.name_scope("augment"):
                    images = self._augment(images)
            return compiled_step(images, local.labels, batch_fraction)

        own_logs = self._own_logs(one_replica, train, "train_step")
        shapes = own_logs or self._metric_ranks()
        numbers = [name for name, rank in shapes.items() if rank == 0 and name != "loss"]
        kept = [name for name in own_logs if name != "loss"] if own_logs else numbers
        recorded = ["loss", "learning_rate", *([] if self._several_workers else kept)]
        if self._gradient_norms:
            recorded.append("gradient_norms")

        def one_step(i: tf.Tensor, state: Any, first: tf.Tensor, arrays: list[Any]) -> list[Any]:
            with tf.name_scope("record"):
                learning_rate = _learning_rate(self.model.optimizer)
            with tf.name_scope("batch"):
                batch = train.global_batch(state, first + i)
            parts = self.strategy.run(one_replica, args=(batch,))
            with tf.name_scope("record"):
                values = self._values(parts, own=bool(own_logs))
                values["learning_rate"] = learning_rate
                return [
                    array.write(i, tf.cast(values[name], tf.float32))
                    for array, name in zip(arrays, recorded, strict=True)
                ]

        def call(state: Any, first: tf.Tensor, count: tf.Tensor) -> Any:
            arrays = [tf.TensorArray(tf.float32, size=count) for _ in recorded]
            arrays = _repeat(count, lambda i, arrays: one_step(i, state, first, arrays), arrays)
            stacked = {name: array.stack() for name, array in zip(recorded, arrays, strict=True)}
            if own_logs:
                logs = {name: stacked[name][-1] for name in own_logs}
            else:
                logs = metric_tensors(self.model.get_metrics_result())
            if self._several_workers:
                stacked |= {name: logs[name][None] for name in numbers}
            vectors = own_logs.keys() - {"loss", *numbers}
            return {name: v for name, v in stacked.items() if name not in vectors}, logs

        return self._compiled(call, train)

    def _metric_ranks(self) -> dict[str, int]:
        """Returns how many dimensions the value of each metric has."""
        with self.devices.scope():
            results = metric_tensors(self.model.get_metrics_result())
        return {name: value.shape.rank for name, value in results.items()}

    def _own_logs(self, one_replica: Any, batches: Batches, method: str) -> dict[str, int]:
        """Returns the logs of a step of the model's own: their names and how many dimensions.

        As in Keras, they are used if their names are not those of the model's metrics. To learn
        them, the step is traced once more.

        Args:
            one_replica: Takes a global batch; its result has the logs under "logs".
            batches: What it is traced for.
            method: "train_step" or "test_step".
        """
        if not (overrides(self.model, method) or overrides(self.model, "compute_metrics")):
            return {}

        def probe(state: Any, step: tf.Tensor) -> dict[str, tf.Tensor]:
            return metric_tensors(one_replica(batches.global_batch(state, step))["logs"])

        with self.devices.scope():
            traced = tf.function(probe, autograph=False).get_concrete_function(
                batches.start_epoch(0), tf.constant(0)
            )
        ranks = {name: value.shape.rank for name, value in traced.structured_outputs.items()}
        if "loss" not in ranks:
            received = ", ".join(ranks) or "none"
            raise InputError(f"{method}: expected logs that have 'loss', received {received}")
        return {} if ranks.keys() == self._metric_ranks().keys() else ranks

    def _values(self, parts: dict[str, Any], *, own: bool) -> dict[str, tf.Tensor]:
        """Returns what a step is recorded by: its loss, gradient norms and the metrics so far."""
        if own:
            return dict(parts["logs"])
        several = self._several_workers
        values = {} if several else metric_tensors(self.model.get_metrics_result())
        # The replicas' parts of the loss add up; gradient norms are alike on each.
        values["loss"] = self.strategy.reduce("SUM", parts["loss"], axis=None)
        if "gradient_norms" in parts:
            norms = self.strategy.experimental_local_results(parts["gradient_norms"])
            values["gradient_norms"] = norms[0]
        return values

    def _trace_evaluation(self, batches: Batches, collect: bool) -> Any:
        """Builds the graph of a call that scores as many batches as its argument says."""

        def one_replica(batch: Any) -> dict[str, Any]:
            local, batch_fraction = self._local_batch(batches, batch)
            if self._own_test_step:
                logs = metric_tensors(self.model.test_step((local.images, local.labels)))
                outputs = self.model(local.images, training=False) if collect else tf.zeros((1, 0))
            else:
                outputs, logs = test_step(
                    self.model, local.images, local.labels, batch_fraction=batch_fraction
                )
            if batch_fraction is not None and collect:
                # Also for a smaller batch as many rows as in the others: shapes must not change.
                rest = batches.batch_size - local.first - local.count
                outputs = tf.pad(outputs[: local.count], ((local.first, rest), (0, 0)))
            return {"outputs": tf.cast(outputs, tf.float32), "size": local.size, "logs": logs}

        own_logs = self._own_logs(one_replica, batches, "test_step")

        def one_step(i: tf.Tensor, state: Any, first: tf.Tensor, carried: Any) -> Any:
            array, logs = carried
            with tf.name_scope("batch"):
                batch = batches.global_batch(state, first + i)
            parts = self.strategy.run(one_replica, args=(batch,))
            logs = [
                each.write(i, tf.cast(parts["logs"][name], tf.float32))
                for each, name in zip(logs, own_logs, strict=True)
            ]
            if not collect:
                return array, logs
            # Each replica has its own rows of the batch and zeros for the others.
            size = self.strategy.experimental_local_results(parts["size"])[0]
            outputs = self.strategy.reduce("SUM", parts["outputs"], axis=None)
            return array.write(i, outputs[:size]), logs

        def call(state: Any, first: tf.Tensor, count: tf.Tensor) -> Any:
            array = tf.TensorArray(tf.float32, size=count, infer_shape=False)
            carried = (array, [tf.TensorArray(tf.float32, size=count) for _ in own_logs])
            carried = _repeat(count, lambda i, arrays: one_step(i, state, first, arrays), carried)
            probabilities = carried[0].concat() if collect else tf.zeros((0,))
            if own_logs:
                logs = {n: a.stack()[-1] for n, a in zip(own_logs, carried[1], strict=True)}
                return probabilities, logs
            return probabilities, metric_tensors(self.model.get_metrics_result())

        return self._compiled(call, batches)

    def _local_batch(self, batches: Batches, batch: Any) -> tuple[LocalBatch, tf.Tensor | None]:
        """Returns this replica's part of a batch, and its share of the rows (None: one replica)."""
        with tf.name_scope("batch"):
            local = batches.local_batch(batch)
            if self.devices.replicas == 1:
                return local, None
            return local, tf.cast(local.count, tf.float32) / tf.cast(local.size, tf.float32)

    def _compiled(self, call: Any, batches: Batches) -> Any:
        with self.devices.scope():
            # Not `call` itself, which TensorFlow would trace a second time when it is first called.
            graph = tf.function(call, autograph=False)
            state = batches.start_epoch(0)
            return graph.get_concrete_function(state, tf.constant(0), tf.constant(1))

    def _run(self, call: Any, state: Any, first: int, count: int) -> Any:
        """Runs a traced call on the devices; TensorFlow may return before they have finished.

        Raises:
            InputError: XLA cannot compile the step.
        """
        try:
            with self.devices.scope():
                return call(state, tf.constant(first), tf.constant(count))
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            refused = xla_refusal(error, self.layer_names) if self._jit_compile else None
            if refused is None:
                raise
            raise InputError(
                f"XLA cannot compile {refused}: set training.jit_compile = false"
            ) from error

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers that operations of a graph may belong to."""
        own = [] if self._augment is None else getattr(self._augment, "layers", [])
        return [layer.name for layer in nested_layers([*self.model.layers, *own])]

    def _timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function and adds its seconds to one part of `seconds`."""
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            setattr(self.seconds, part, getattr(self.seconds, part) + time.perf_counter() - start)


def _repeat(count: tf.Tensor, step: Callable[[tf.Tensor, Any], Any], state: Any) -> Any:
    """Returns `state` after `count` times `state = step(i, state)`, in the graph.

    Written out, because AutoGraph, which turns a Python `for` into this, takes most of a second.
    """
    return tf.while_loop(
        lambda i, _: i < count,
        lambda i, state: (i + 1, step(i, state)),
        (tf.constant(0), state),
        # Steps overlap otherwise, and one worker's exchange would meet that of another's next step.
        parallel_iterations=1,
    )[1]


def _refuse_on_several_devices(model: keras.Model, *, jit_compile: bool) -> None:
    """Refuses what would end in an error of TensorFlow's, or in other numbers than one device's."""
    methods = ("train_step", "test_step", "compute_metrics")
    own = [method for method in methods if overrides(model, method)]
    if own:
        raise InputError(f"a model with its own {own[0]}: expected one device, received several")
    if jit_compile:
        raise InputError("training.jit_compile: expected one device, received several")
    for option in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
        if getattr(model.optimizer, option, None):
            raise InputError(f"{option}: expected one device, received several")


def _require_a_mean(model: keras.Model, devices: Devices) -> None:
    """Refuses a loss that is no mean over the images of a batch, or that Keras does not divide.

    Keras divides a loss by the number of replicas if it is a mean of one value for each image.
    Their sum is the loss of the batch only if all of it is divided. The loss is computed for some
    images, for the same images twice, and as one replica computes it.

    Raises:
        InputError: The three do not agree.
    """
    classes = int(model.output_shape[-1])
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2 * classes, *model.input_shape[1:]))
    labels = np.arange(2 * classes) % classes

    def loss(repeats: int) -> float:
        batch = tf.constant(np.repeat(images, repeats, axis=0), model.inputs[0].dtype)
        outputs = model(batch, training=False)
        truth = tf.constant(np.repeat(labels, repeats))
        return float(compute_loss(model, batch, truth, outputs, None, training=False))

    once, twice = loss(1), loss(2)
    with devices.scope():
        part = loss(1)
    tolerance = 0.02 if "float16" in model.dtype_policy.compute_dtype else 1e-3
    if not np.allclose([twice, part * devices.replicas], once, rtol=tolerance, atol=1e-6):
        raise InputError(
            "training.loss on several devices: expected one value for each image and a reduction "
            "to their mean, also of losses of layers; received a sum, or one number for the batch"
        )


def _schedule(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the learning-rate schedule of an optimizer, as its configuration; None for a rate."""
    try:
        rate = optimizer.get_config().get("learning_rate")
    except NotImplementedError:  # of a user's own schedule: changes of it are not noticed
        return None
    return rate if isinstance(rate, dict) else None


def _learning_rate(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Returns the learning rate; not a number for a MultiOptimizer, which has several."""
    rate = getattr(optimizer, "learning_rate", None)
    return tf.constant(math.nan) if rate is None else tf.identity(rate)


def _same(one: list[Any], other: list[Any]) -> bool:
    """Returns whether two lists have the same objects; configurations are compared by value."""
    return len(one) == len(other) and all(
        a == b if isinstance(a, dict) else a is b for a, b in zip(one, other, strict=True)
    )


def _packed(value: Any) -> Any:
    """Returns a list of results, at any depth, as one tensor."""
    if isinstance(value, list | tuple):
        return tf.stack([tf.convert_to_tensor(_packed(part)) for part in value])
    return value + 0 if isinstance(value, keras.Variable) else value


def metric_tensors(logs: Any) -> dict[str, tf.Tensor]:
    """Returns logs as tensors. As in Keras, a result that is a dictionary is several logs.

    Raises:
        TypeError: The logs are no dictionary, or a value is no number and no list of numbers.
        ValueError: Likewise.
    """
    if not isinstance(logs, dict):
        raise TypeError(f"expected a dictionary of logs, received {type(logs).__name__}")
    found: dict[str, tf.Tensor] = {}
    for name, value in logs.items():
        if isinstance(value, dict):
            found |= metric_tensors(value)
        else:
            found[name] = keras.ops.convert_to_tensor(_packed(value))
    return found


def _as_logs(results: dict[str, Any]) -> Logs:
    arrays = {name: value.numpy() for name, value in results.items()}
    return {name: value if value.ndim else float(value) for name, value in arrays.items()}
