"""A call: one execution of a compiled function that runs a step on many batches.

No Python runs between these steps. The values of each step are one row of float32 numbers, and the
host reads all rows at the end of the call.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.devices import Devices
from trainer.training.batches import Batches
from trainer.training.step import metric_tensors

# Logs as Keras passes them to callbacks: floats, and arrays for metrics with several values.
Logs = dict[str, Any]
Tensors = dict[str, tf.Tensor]


class Call:
    """A traced function that runs a number of steps of an epoch from a given step.

    Attributes:
        graph: The graph of the function.
    """

    def __init__(
        self,
        model: keras.Model,
        devices: Devices,
        batches: Batches,
        step: Callable[[Any, tf.Tensor], Tensors],
        kind: str,
    ) -> None:
        """Traces the function.

        `step` runs on each replica, with the arguments of `Batches.local_batch`. It returns logs,
        and with them "gradient_norms" and "outputs" if requested. `kind` is "train", "evaluate",
        or "collect": evaluate and return the outputs of all steps.
        """
        self._model, self._devices, self._batches, self._step = model, devices, batches, step
        self._trains, self._collect = kind == "train", kind == "collect"
        self._shapes: dict[str, tuple[int, ...]] = {}  # of each value in a row
        # Logs that the step itself returns. As in Keras, the results of the metrics are used
        # if the names are the same.
        self._own_logs: list[str] = []

        def call(state: Any, first: tf.Tensor, count: tf.Tensor) -> Any:
            rows = tf.TensorArray(tf.float32, size=count)
            outputs = tf.TensorArray(tf.float32, size=count, infer_shape=False)
            # Not a Python loop: AutoGraph needs most of a second to convert it. One iteration at a
            # time: the communication of steps that overlap would mix.
            _, rows, outputs = tf.while_loop(
                lambda i, *_: i < count,
                lambda i, *arrays: (i + 1, *self._run_step(i, state, first + i, *arrays)),
                (tf.constant(0), rows, outputs),
                parallel_iterations=1,
            )
            metrics = {} if self._own_logs else metric_tensors(model.get_metrics_result())
            return rows.stack(), metrics, outputs.concat() if self._collect else None

        with devices.scope():
            self._metric_names = metric_tensors(model.get_metrics_result()).keys()
            # The concrete function, because a call of the tf.function would trace it again.
            self._function = tf.function(call, autograph=False).get_concrete_function(
                batches.start_epoch(0), tf.constant(0), tf.constant(1)
            )
        self.graph: tf.Graph = self._function.graph

    def __call__(self, state: Any, first: int, count: int) -> Any:
        """Starts the steps; TensorFlow may return before the devices have finished.

        Returns:
            Arguments of `read`, and the outputs, float32 [images, n], or None.
        """
        with self._devices.scope():
            return self._function(state, tf.constant(first), tf.constant(count))

    def read(self, rows: tf.Tensor, metrics: Tensors) -> tuple[dict[str, NDArray[Any]], Logs]:
        """Returns the values of each step by name, [steps, ...], and the logs of the last step."""
        array, values, first = rows.numpy(), {}, 0
        for name, shape in self._shapes.items():
            last = first + math.prod(shape)
            values[name] = array[:, first:last].reshape(-1, *shape)
            first = last
        own = {name: values[name][-1] for name in self._own_logs}
        logs = {name: np.asarray(value) for name, value in (own or metrics).items()}
        return values, {n: value if value.ndim else float(value) for n, value in logs.items()}

    def _run_step(self, i: tf.Tensor, state: Any, step: Any, rows: Any, outputs: Any) -> Any:
        """Runs one step on all replicas and writes its values to row `i`."""
        with tf.name_scope("record"):  # the learning rate before the step changes it
            # NaN for a MultiOptimizer, which has several.
            rate = tf.identity(getattr(self._model.optimizer, "learning_rate", math.nan))
        values = self._devices.strategy.run(self._step, args=(state, step))
        with tf.name_scope("record"):
            values = self._combined(values)
            output, norms = values.pop("outputs", None), values.pop("gradient_norms", None)
            if self._devices.replicas == 1 and values.keys() != self._metric_names:
                self._own_logs = list(values)
            elif not self._trains:
                values = {}
            else:  # only single numbers are recorded
                values = {name: value for name, value in values.items() if value.shape.rank == 0}
            if self._trains:
                values["learning_rate"] = rate
            if norms is not None:
                values["gradient_norms"] = norms
            self._shapes = {name: tuple(value.shape) for name, value in values.items()}
            flat = [tf.reshape(tf.cast(v, tf.float32), (-1,)) for v in values.values()]
            rows = rows.write(i, tf.concat(flat, axis=0) if flat else tf.zeros((0,)))
            if self._collect:
                outputs = outputs.write(i, output[: self._batches.size(step)])
        return rows, outputs

    def _combined(self, values: Tensors) -> Tensors:
        """Returns each value summed over the replicas. Gradient norms are equal on all replicas."""
        if self._devices.replicas == 1:
            return dict(values)
        strategy, norms = self._devices.strategy, values.pop("gradient_norms", None)
        combined = {name: strategy.reduce("SUM", v, axis=None) for name, v in values.items()}
        if norms is not None:
            combined["gradient_norms"] = strategy.experimental_local_results(norms)[0]
        if self._trains and self._devices.workers == 1:  # several workers would communicate
            combined = metric_tensors(self._model.get_metrics_result()) | combined
        return combined
