"""Callbacks that show and record a training: progress bar, metrics.jsonl, TensorBoard, profile."""

import json
import logging
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress, TextColumn

from trainer.training.call import Logs
from trainer.training.loop import CallRecord

_log = logging.getLogger(__name__)


class Callback(keras.callbacks.Callback):
    """A Keras callback with more methods; the loop calls `on_call_end` with each record."""

    def on_call_end(self, record: CallRecord) -> None:
        """Called after each call of the loop, which runs many steps."""

    def flush(self) -> None:
        """Called before a checkpoint stores the size of the logs."""

    def close(self) -> None:
        """Called when training has ended, also after an error."""


class StepTimes(Callback):
    """Records the time per step of each call. The device is idle at the start and end of a call.

    Skips the first call, which also sets up kernels, and calls that the profiler traces.
    """

    def __init__(self) -> None:
        """Starts empty."""
        super().__init__()
        self.step_ms: list[float] = []
        self.images_per_second: list[float] = []

    def on_call_end(self, record: CallRecord) -> None:
        """Adds the times of a call."""
        if record.warm:
            self.step_ms.append(1000 * record.seconds / record.steps)
            self.images_per_second.append(record.images / record.seconds)

    def summary(self) -> dict[str, Any]:
        """Returns medians and quartiles, None if nothing was measured, and the number of calls."""
        names = ("step_ms", "step_ms_quartiles", "images_per_second")
        summary: dict[str, Any] = dict.fromkeys(names)
        if self.step_ms:
            low, median, high = np.percentile(self.step_ms, (25, 50, 75)).round(4).tolist()
            summary["step_ms"], summary["step_ms_quartiles"] = median, [low, high]
            summary["images_per_second"] = round(float(np.median(self.images_per_second)), 1)
        return summary | {"windows": len(self.step_ms)}


class ProgressBar(Callback):
    """Shows loss, metrics, images per second and the time left, and logs one line per epoch."""

    def __init__(self, console: Console, *, steps: int, epochs: int) -> None:
        """Creates a bar for `epochs` of `steps` each."""
        super().__init__()
        self._epochs = epochs
        columns, hidden = Progress.get_default_columns(), not console.is_terminal
        text = TextColumn("{task.fields[text]}")
        self._bar = Progress(*columns, text, console=console, transient=True, disable=hidden)
        self._task = self._bar.add_task("epoch 1", total=steps * epochs, text="")

    def on_train_begin(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Shows the bar."""
        self._bar.start()

    def on_call_end(self, record: CallRecord) -> None:
        """Moves the bar."""
        self._bar.update(
            self._task,
            completed=record.first_step + record.steps,
            description=f"epoch {record.epoch + 1}/{self._epochs}",
            text=f"{format_metrics(record.logs)}  {record.images / record.seconds:,.0f} images/s",
        )

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Logs the metrics of the epoch."""
        _log.info("epoch %d/%d  %s", epoch + 1, self._epochs, format_metrics(logs or {}))

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()


class MetricsFile(StepTimes):
    """Appends a line of JSON for each epoch."""

    def __init__(self, path: Path) -> None:
        """Stores the path."""
        super().__init__()
        self._path = path
        self._step, self._learning_rate = 0, 0.0

    def on_call_end(self, record: CallRecord) -> None:
        """Stores the values for the line of the epoch."""
        super().on_call_end(record)
        self._step = record.first_step + record.steps
        self._learning_rate = float(record.learning_rate[-1])

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Writes the line of the epoch."""
        line = to_json({"learning_rate": self._learning_rate} | (logs or {}))
        line |= {"epoch": epoch + 1, "step": self._step, **self.summary()}
        self.step_ms, self.images_per_second = [], []
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


class TensorBoardCurves(Callback):
    """Writes curves per step and per epoch, step times, and histograms if requested.

    Training and validation are two TensorBoard runs with the same tags, so TensorBoard draws both
    in one chart. The x axis is the number of steps, and for `epoch/...` the number of epochs.
    """

    def __init__(self, folder: Path, *, histograms: bool) -> None:
        """Stores the arguments; the files are in `folder`/train and `folder`/validation."""
        super().__init__()
        self._folder, self._histograms = folder, histograms
        self._writers: dict[str, Any] = {}
        self._gradient_norms: list[Any] = []  # of each call of the epoch, [steps, weights]
        self._learning_rate = 0.0
        self._write_steps: Any = None  # the graph that writes the points of each step

    def on_train_begin(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Opens the files."""
        for run in ("train", "validation"):
            self._writers[run] = tf.summary.create_file_writer(str(self._folder / run))

    def on_call_end(self, record: CallRecord) -> None:
        """Writes the points of each step of a call, and its times."""
        self._learning_rate = float(record.learning_rate[-1])
        curves = {"loss": record.loss, "learning_rate": record.learning_rate} | record.metrics
        with self._writers["train"].as_default(step=record.first_step + record.steps):
            if self._write_steps is None:
                self._write_steps = _step_writer(list(curves))
            values = np.stack(list(curves.values()), axis=1)  # [steps, curves]
            self._write_steps(tf.constant(values), tf.constant(record.first_step + 1, tf.int64))
            for name, value in scalars(record.logs).items():
                if name not in curves:  # with several workers: one value for the whole call
                    tf.summary.scalar(f"step/{name}", value)
            if record.warm:
                tf.summary.scalar("step_ms", 1000 * record.seconds / record.steps)
                tf.summary.scalar("images_per_second", record.images / record.seconds)
                worker_ms = 1000 * record.worker_seconds / record.steps
                for worker, value in enumerate(worker_ms if len(worker_ms) > 1 else ()):
                    tf.summary.scalar(f"worker_{worker}/step_ms", value)
        if self._histograms and record.gradient_norms is not None:
            self._gradient_norms.append(record.gradient_norms)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Writes the points of an epoch."""
        values = scalars(logs or {}) | {"learning_rate": self._learning_rate}
        for name, value in values.items():
            run = "validation" if name.startswith("val_") else "train"
            with self._writers[run].as_default(step=epoch + 1):
                tf.summary.scalar(f"epoch/{name.removeprefix('val_')}", value)
        with self._writers["train"].as_default(step=epoch + 1):
            weights = self.model.trainable_variables if self._histograms else []
            for i, weight in enumerate(weights):
                tf.summary.histogram(f"weights/{weight.path}", weight.numpy())
                if self._gradient_norms:
                    norms = np.concatenate([each[:, i] for each in self._gradient_norms])
                    tf.summary.histogram(f"gradient_norms/{weight.path}", norms)
        self._gradient_norms.clear()
        self.flush()

    def flush(self) -> None:
        """Writes every point to its file."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()


class Profiler(Callback):
    """Traces the second call for TensorBoard's profiler page."""

    def __init__(self, folder: Path) -> None:
        """Stores the folder of the trace."""
        super().__init__()
        self._folder = folder
        self._calls = 0

    def on_call_end(self, record: CallRecord) -> None:  # noqa: ARG002
        """Starts the trace after the first call and stops it after the second."""
        self._calls += 1
        if self._calls == 1:
            tf.profiler.experimental.start(str(self._folder))
        elif self._calls == 2:
            tf.profiler.experimental.stop()

    def close(self) -> None:
        """Writes the trace of a training that had only one call."""
        if self._calls == 1:
            tf.profiler.experimental.stop()


def _step_writer(names: list[str]) -> Any:
    """Returns a graph function that writes a point for each step, without Python in between."""

    def write(values: tf.Tensor, first: tf.Tensor) -> None:
        def one_step(i: tf.Tensor) -> tuple[tf.Tensor]:
            with tf.name_scope("step/"):  # the slash removes "while/", the scope of the loop
                for column, name in enumerate(names):
                    tf.summary.scalar(name, values[i, column], step=first + i)
            return (i + 1,)

        steps = tf.shape(values, out_type=tf.int64)[0]
        tf.while_loop(lambda i: i < steps, one_step, (tf.constant(0, tf.int64),))

    signature = (tf.TensorSpec((None, len(names))), tf.TensorSpec((), tf.int64))
    graph = tf.function(write, input_signature=signature, autograph=False)  # AutoGraph is slower
    return graph.get_concrete_function()


def format_metrics(logs: Logs) -> str:
    """Returns the metrics that are single numbers as text."""
    return "  ".join(
        f"{name} {value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{name} {value:.2e}"
        for name, value in scalars(logs).items()
    )


def to_json(logs: Logs) -> dict[str, Any]:
    """Returns logs as JSON values: numbers, lists of numbers, and null for NaN and infinity."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        if isinstance(value, int | float):
            return value if np.isfinite(value) else None
        return None if value is None else str(value)  # a callback may add any value

    return {name: convert(np.asarray(value).tolist()) for name, value in logs.items()}


def scalars(logs: Logs) -> dict[str, float]:
    """Returns the logs that are single numbers."""
    kinds = (int, float, np.integer, np.floating)
    return {name: float(value) for name, value in logs.items() if isinstance(value, kinds)}
