"""The loop: epochs, calls of many steps, validation, Keras callbacks, and the clock.

A call is one execution of a compiled function that runs the step many times, so that Python costs
nothing between steps. The host and the device meet once a call: there logs are read, callbacks run
and the clock is looked at.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer import kernels
from trainer.devices import Devices
from trainer.errors import CheckError, InputError
from trainer.training.batches import Batches, LocalBatch
from trainer.training.step import test_step, train_step

# What Keras gives to callbacks: floats, and arrays where a metric has several values.
Logs = dict[str, Any]


# Reductions whose replicas' values, weighted by their share of the batch, add up to the batch's.
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@dataclass(frozen=True)
class Position:
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
class Window:
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
        steps_per_call: int = 50,
        clip_norm: float | None = None,
        jit_compile: bool = False,
        augment: Callable[[tf.Tensor], tf.Tensor] | None = None,
        gradient_norms: bool = False,
    ) -> None:
        """Prepares the loop.

        Args:
            model: Built and compiled inside the scope of the devices.
            devices: One device or several.
            steps_per_call: The most steps in one call.
            clip_norm: Largest global norm of the gradients, or None.
            jit_compile: Compile the step with XLA. Choosing, gathering and augmenting the images is
                left out: three of Keras's augmentation layers have no XLA kernel.
            augment: Alters training images, uint8 [rows, H, W, C] to the same.
            gradient_norms: Record the norm of each weight's gradient at each step.

        Raises:
            InputError: There are several devices, and the loss is no mean over the batch, or XLA or
                the accumulation of gradients is asked for.
        """
        self.model = model
        self.devices = devices
        self.strategy = devices.strategy
        self.steps_per_call = steps_per_call
        self.seconds = Seconds()
        self.step_graph: tf.Graph | None = None
        self._traced: Any = None
        self._calls, self._warmup_calls = 0, 1
        self._augment = augment
        self._jit_compile = jit_compile
        if devices.replicas > 1:
            _refuse_on_several_devices(model, jit_compile=jit_compile)
        self._clip_norm = clip_norm
        self._gradient_norms = gradient_norms
        self._several_workers = devices.workers > 1
        self._evaluations: dict[tuple[int, bool], tuple[Batches, Any]] = {}
        with devices.scope():
            # Keras makes the variables of optimizer and metrics at their first use. That would be
            # inside the graph of one replica, where a strategy lets none be made.
            model.optimizer.build(model.trainable_variables)
            shapes = [(1, *shape[1:]) for shape in (model.input_shape, model.output_shape)]
            model.compute_metrics(tf.zeros(shapes[0]), tf.zeros((1,)), tf.zeros(shapes[1]))
            model.reset_metrics()

    def fit(
        self,
        train: Batches,
        validation: Batches | None = None,
        *,
        epochs: int,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        observers: Sequence[Callable[[Window], None]] = (),
        warmup_calls: int = 1,
        start: Position | None = None,
    ) -> dict[str, list[float]]:
        """Trains the model.

        Args:
            train: Batches to train on.
            validation: Batches scored after each epoch; their metrics are named `val_...`.
            epochs: How often to go through `train`.
            callbacks: Keras callbacks. Their batch methods run once a call, as Keras runs them
                under `steps_per_execution`.
            observers: Called with each window after the callbacks.
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
        call = self.trace(train)
        start = start or Position()
        logs: Logs = {}
        diverged, epoch = None, start.epoch
        for epoch in range(start.epoch, epochs):
            position = start if epoch == start.epoch else Position(epoch)
            if position.step == 0:
                if model.stop_training:
                    break
                self._timed("callbacks", callback_list.on_epoch_begin, epoch)
            logs, diverged = self._epoch(call, train, position, callback_list, observers)
            if diverged is not None:
                break
            if validation is not None:
                scores = self._validate(validation, callback_list)
                if not np.isfinite(scores["loss"]):  # the last update of the epoch did it
                    diverged = ((epoch + 1) * train.steps, scores["loss"])
                    break
                logs |= {f"val_{name}": value for name, value in scores.items()}
            self._timed("callbacks", callback_list.on_epoch_end, epoch, logs)
        # For optimizers that average the weights: the average takes their place.
        model.optimizer.finalize_variable_values(model.trainable_variables)
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
        self._traced = self._timed("tracing", self._trace_training, train)
        return self._traced

    def check_kernels(self, device_type: str | None = None) -> kernels.KernelReport:
        """Looks for operations of the traced training step that run on the CPU.

        Args:
            device_type: "GPU" or "CPU"; None: the type of the devices in use.
        """
        return kernels.check_kernels(
            self._traced.graph,
            device_type or self.devices.type,
            layers=self._layers,
            traced_on=self.devices.names if self.devices.replicas > 1 else (),
        )

    def check_xla_kernels(self) -> tuple[kernels.HostOperation, ...]:
        """Returns the operations of the traced training step that XLA has no GPU kernel for."""
        return kernels.check_xla(self.step_graph, self._layers)

    def repeat(self, train: Batches, steps: int) -> Iterator[Window]:
        """Trains without end, and without validation and callbacks: what a benchmark measures.

        Args:
            train: Batches to train on.
            steps: In each call; at most those of an epoch.

        Yields:
            What each call recorded, as `fit` gives it to its observers.
        """
        call = self.trace(train)
        for epoch in itertools.count():
            state = train.start_epoch(epoch)
            for first in range(0, train.steps - steps + 1, steps):
                yield self._run_call(call, train, state, epoch, first, steps)

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
        key = (id(batches), collect)
        if key not in self._evaluations:
            traced = self._timed("tracing", self._trace_evaluation, batches, collect)
            # Keeping the batches keeps their id from being given to others.
            self._evaluations[key] = (batches, traced)
        call = self._evaluations[key][1]
        self.model.reset_metrics()
        if callbacks is not None:
            callbacks.on_test_begin()
        state = batches.start_epoch(0)
        outputs, logs = [], {}
        for first in range(0, batches.steps, self.steps_per_call):
            count = min(self.steps_per_call, batches.steps - first)
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
        if callbacks is not None:
            callbacks.on_test_end(logs)
        return logs, np.concatenate(outputs) if collect else None

    def _epoch(
        self,
        call: Any,
        train: Batches,
        position: Position,
        callbacks: keras.callbacks.CallbackList,
        observers: Sequence[Callable[[Window], None]],
    ) -> tuple[Logs, tuple[int, float] | None]:
        """Trains one epoch; returns its logs, and the step and value of a loss that diverged."""
        if position.step == 0:
            self.model.reset_metrics()
        epoch, logs = position.epoch, dict(position.logs)
        state = train.start_epoch(epoch, position.step)
        for first in range(position.step, train.steps, self.steps_per_call):
            if self.model.stop_training:
                break
            count = min(self.steps_per_call, train.steps - first)
            self._timed("callbacks", callbacks.on_train_batch_begin, first)
            window = self._run_call(call, train, state, epoch, first, count)
            logs = dict(window.logs)
            self._timed("callbacks", callbacks.on_train_batch_end, first + count - 1, logs)
            for observer in observers:
                self._timed("callbacks", observer, window)
            bad = np.flatnonzero(~np.isfinite(window.loss))
            if len(bad):
                return logs, (window.first_step + int(bad[0]) + 1, float(window.loss[bad[0]]))
        return logs, None

    def _run_call(
        self, call: Any, train: Batches, state: Any, epoch: int, first: int, count: int
    ) -> Window:
        """Runs `count` steps and waits for the device."""
        start = time.perf_counter()
        # The mark by which the profiler's pages count steps; it costs nothing unless one listens.
        with tf.profiler.experimental.Trace("train", step_num=first, _r=1):
            recorded, logs = self._run(call, state, first, count)
        for name in self.devices.names:
            with tf.device(name):
                tf.raw_ops.SyncDevice()
        seconds = time.perf_counter() - start
        self.seconds.training += seconds
        self._calls += 1
        values = {name: value.numpy() for name, value in recorded.items()}
        return Window(
            epoch=epoch,
            first_step=epoch * train.steps + first,
            steps=count,
            images=min(train.images - first * train.batch_size, count * train.batch_size),
            seconds=seconds,
            worker_seconds=self.devices.exchange([seconds])[:, 0],
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

        def step(images: tf.Tensor, labels: tf.Tensor, share: Any) -> dict[str, tf.Tensor]:
            self.step_graph = images.graph  # what TensorBoard draws: the step, without the loop
            return train_step(
                self.model,
                images,
                labels,
                share=share,
                clip_norm=self._clip_norm,
                gradient_norms=self._gradient_norms,
            )

        compiled_step = tf.function(step, jit_compile=True) if self._jit_compile else step

        def one_replica(batch: Any) -> dict[str, tf.Tensor]:
            local, share = self._local_batch(train, batch)
            images = local.images
            if self._augment is not None:
                with tf.name_scope("augment"):
                    images = self._augment(images)
            return compiled_step(images, local.labels, share)

        metrics = {name: len(v.shape) for name, v in self.model.get_metrics_result().items()}
        numbers = [name for name, rank in metrics.items() if rank == 0 and name != "loss"]
        recorded = ["loss", "learning_rate", *([] if self._several_workers else numbers)]
        if self._gradient_norms:
            recorded.append("gradient_norms")

        def one_step(i: tf.Tensor, state: Any, first: tf.Tensor, arrays: list[Any]) -> list[Any]:
            with tf.name_scope("record"):
                learning_rate = tf.identity(self.model.optimizer.learning_rate)
            with tf.name_scope("batch"):
                batch = train.global_batch(state, first + i)
            parts = self.strategy.run(one_replica, args=(batch,))
            with tf.name_scope("record"):
                values = self._values(parts) | {"learning_rate": learning_rate}
                return [
                    array.write(i, tf.cast(values[name], tf.float32))
                    for array, name in zip(arrays, recorded, strict=True)
                ]

        def call(state: Any, first: tf.Tensor, count: tf.Tensor) -> Any:
            arrays = [tf.TensorArray(tf.float32, size=count) for _ in recorded]
            arrays = _repeat(count, lambda i, arrays: one_step(i, state, first, arrays), arrays)
            stacked = {name: array.stack() for name, array in zip(recorded, arrays, strict=True)}
            logs = self.model.get_metrics_result()
            return {name: logs[name][None] for name in numbers} | stacked, logs

        return self._compiled(call, train)

    def _values(self, parts: dict[str, Any]) -> dict[str, tf.Tensor]:
        """Returns what a step is recorded by: its loss, gradient norms and the metrics so far."""
        several = self._several_workers
        values: dict[str, tf.Tensor] = {} if several else self.model.get_metrics_result()
        # The replicas' parts of the loss add up; gradient norms are alike on each.
        values["loss"] = self.strategy.reduce("SUM", parts["loss"], axis=None)
        if "gradient_norms" in parts:
            norms = self.strategy.experimental_local_results(parts["gradient_norms"])
            values["gradient_norms"] = norms[0]
        return values

    def _trace_evaluation(self, batches: Batches, collect: bool) -> Any:
        """Builds the graph of a call that scores as many batches as its argument says."""

        def one_replica(batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
            local, share = self._local_batch(batches, batch)
            outputs = test_step(self.model, local.images, local.labels, share=share)
            if share is None or not collect:
                return outputs, local.size
            # Also for a smaller batch as many rows as in the others: shapes must not change.
            rest = batches.batch_size - local.first - local.count
            return tf.pad(outputs[: local.count], ((local.first, rest), (0, 0))), local.size

        def one_step(i: tf.Tensor, state: Any, first: tf.Tensor, array: Any) -> Any:
            with tf.name_scope("batch"):
                batch = batches.global_batch(state, first + i)
            outputs, sizes = self.strategy.run(one_replica, args=(batch,))
            if not collect:
                return array
            # Each replica has its own rows of the batch and zeros for the others.
            size = self.strategy.experimental_local_results(sizes)[0]
            return array.write(i, self.strategy.reduce("SUM", outputs, axis=None)[:size])

        def call(state: Any, first: tf.Tensor, count: tf.Tensor) -> Any:
            array = tf.TensorArray(tf.float32, size=count, infer_shape=False)
            array = _repeat(count, lambda i, array: one_step(i, state, first, array), array)
            probabilities = array.concat() if collect else tf.zeros((0,))
            return probabilities, self.model.get_metrics_result()

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
            refused = kernels.xla_refusal(error, self._layers) if self._jit_compile else None
            if refused is None:
                raise
            raise InputError(
                f"XLA cannot compile {refused}: set training.jit_compile = false"
            ) from error

    @property
    def _layers(self) -> list[str]:
        """Names of the layers that operations of a graph may belong to."""
        own = [] if self._augment is None else getattr(self._augment, "layers", [])
        return [layer.name for layer in [*self.model.layers, *own]]

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
    for loss in keras.tree.flatten(model.loss):
        reduction = getattr(loss, "reduction", _MEANS[0])
        if reduction not in _MEANS:
            raise InputError(
                f"training.loss on several devices: expected a reduction of {', '.join(_MEANS)}, "
                f"received {reduction!r}"
            )
    if jit_compile:
        raise InputError("training.jit_compile: expected one device, received several")
    if getattr(model.optimizer, "gradient_accumulation_steps", None):
        raise InputError("gradient_accumulation_steps: expected one device, received several")


def _as_logs(results: dict[str, Any]) -> Logs:
    arrays = {name: value.numpy() for name, value in results.items()}
    return {name: value if value.ndim else float(value) for name, value in arrays.items()}
