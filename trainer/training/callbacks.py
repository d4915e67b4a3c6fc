"""What a person watches while it trains: the progress bar, metrics.jsonl, TensorBoard's curves.

Each is a Keras callback (for the epochs) and an observer of the loop (called with each window).
"""

import json
import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.training.loop import CallRecord, Logs

_log = logging.getLogger(__name__)


class StepTimes:
    """The measured windows of a run: each a call of many steps with a wait at both ends.

    The first call, which also sets up the device's kernels, and calls that were traced for the
    profiler are left out.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.step_ms: list[float] = []
        self.images_per_second: list[float] = []

    def __call__(self, record: CallRecord) -> None:
        """Takes a window."""
        if record.warm:
            self.step_ms.append(1000 * record.seconds / record.steps)
            self.images_per_second.append(record.images / record.seconds)

    def summary(self) -> dict[str, Any]:
        """Returns medians and quartiles; None where nothing was measured."""
        if not self.step_ms:
            return {
                "step_ms": None,
                "step_ms_quartiles": None,
                "images_per_second": None,
                "windows": 0,
            }
        low, middle, high = (float(q) for q in np.percentile(self.step_ms, (25, 50, 75)))
        return {
            "step_ms": round(middle, 4),
            "step_ms_quartiles": [round(low, 4), round(high, 4)],
            "images_per_second": round(statistics.median(self.images_per_second), 1),
            "windows": len(self.step_ms),
        }


class ProgressBar(keras.callbacks.Callback):
    """Shows loss, accuracy, images a second and the time left; plain lines where no one looks."""

    def __init__(self, console: Console, *, steps: int, epochs: int) -> None:
        """Prepares a bar for `epochs` of `steps` each."""
        super().__init__()
        self._console = console
        self._steps = steps
        self._epochs = epochs
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps * epochs, epoch=1, epochs=epochs, text="")

    def __call__(self, record: CallRecord) -> None:
        """Moves the bar to the end of a window."""
        logs = shown(record.logs)
        self._bar.update(
            self._task,
            completed=record.first_step + record.steps,
            epoch=record.epoch + 1,
            text=f"{logs}  {record.images / record.seconds:,.0f} images/s",
        )

    on_call_end = __call__

    def on_train_begin(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Shows the bar."""
        self._bar.start()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Leaves a line for the epoch."""
        _log.info("epoch %d/%d  %s", epoch + 1, self._epochs, shown(logs or {}))

    def on_train_end(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Removes the bar."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back, also after an error."""
        self._bar.stop()


class MetricsFile(keras.callbacks.Callback):
    """Appends a line of JSON for each epoch."""

    def __init__(self, path: Path) -> None:
        """Names the file."""
        super().__init__()
        self._path = path
        self._step, self._learning_rate = 0, 0.0
        self._times = StepTimes()

    def __call__(self, record: CallRecord) -> None:
        """Remembers what the epoch's line needs."""
        self._step = record.first_step + record.steps
        self._learning_rate = float(record.learning_rate[-1])
        self._times(record)

    on_call_end = __call__

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Writes the line of an epoch."""
        line = {
            **plain({"learning_rate": self._learning_rate} | (logs or {})),
            "epoch": epoch + 1,
            "step": self._step,
            **self._times.summary(),
        }
        self._times = StepTimes()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


class TensorBoardCurves(keras.callbacks.Callback):
    """Writes the curves: each step, each epoch, and the times of the device in use.

    Training and validation are two runs of TensorBoard with the same tags, which it draws into the
    same chart. The step of every point is the number of steps trained so far, of an epoch's point
    the epoch.
    """

    def __init__(self, folder: Path, *, histograms: bool) -> None:
        """Opens `folder`/train and `folder`/validation."""
        super().__init__()
        self._writers = {
            name: tf.summary.create_file_writer(str(folder / name))
            for name in ("train", "validation")
        }
        self._histograms = histograms
        self._gradient_norms: list[Any] = []
        self._learning_rate = 0.0
        self._write_steps: Callable[[tf.Tensor, tf.Tensor], None] | None = None

    def __call__(self, record: CallRecord) -> None:
        """Writes the points of a window."""
        self._learning_rate = float(record.learning_rate[-1])
        curves = {"loss": record.loss, "learning_rate": record.learning_rate}
        curves |= {k: values for k, values in record.metrics.items() if len(values) == record.steps}
        end = record.first_step + record.steps
        with self._writers["train"].as_default():
            if self._write_steps is None:
                self._write_steps = _step_writer(list(curves))
            values = np.stack(list(curves.values()), axis=1)  # [steps, curves]
            self._write_steps(tf.constant(values), tf.constant(record.first_step + 1, tf.int64))
            for name in record.metrics.keys() - curves.keys():
                tf.summary.scalar(f"step/{name}", record.metrics[name][-1], step=end)
            if record.warm:
                tf.summary.scalar("step_ms", 1000 * record.seconds / record.steps, step=end)
                tf.summary.scalar("images_per_second", record.images / record.seconds, step=end)
                if len(record.worker_seconds) > 1:
                    for worker, seconds in enumerate(1000 * record.worker_seconds / record.steps):
                        tf.summary.scalar(f"worker_{worker}/step_ms", seconds, step=end)
        if record.gradient_norms is not None:
            self._gradient_norms.append(record.gradient_norms)

    on_call_end = __call__

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Writes the points of an epoch."""
        logs = logs or {}
        values = scalars(logs)
        train = {name: value for name, value in values.items() if not name.startswith("val_")}
        validation = {name[4:]: value for name, value in values.items() if name.startswith("val_")}
        train["learning_rate"] = self._learning_rate
        for run, values in (("train", train), ("validation", validation)):
            with self._writers[run].as_default(step=epoch + 1):
                for name, value in values.items():
                    tf.summary.scalar(f"epoch/{name}", value)
        if self._histograms:
            self._write_histograms(epoch + 1)
        self.flush()

    def flush(self) -> None:
        """Brings every point to its file."""
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Closes the files."""
        self.close()

    def close(self) -> None:
        """Closes the files, also after an error."""
        for writer in self._writers.values():
            writer.close()

    def _write_histograms(self, epoch: int) -> None:
        with self._writers["train"].as_default(step=epoch):
            for weight in self.model.trainable_variables:
                tf.summary.histogram(f"weights/{weight.path}", weight.numpy())
            if self._gradient_norms:
                norms = np.concatenate(self._gradient_norms)  # [steps, weights]
                for weight, column in zip(self.model.trainable_variables, norms.T, strict=True):
                    tf.summary.histogram(f"gradient_norms/{weight.path}", column)
        self._gradient_norms.clear()


class Profiler:
    """Traces the second call, past the first batches, for TensorBoard's profiler page."""

    def __init__(self, folder: Path) -> None:
        """Names the folder the trace goes to."""
        self._folder = folder
        self._calls = 0

    def __call__(self, record: CallRecord) -> None:  # noqa: ARG002 - only counted
        """Starts the trace after the first call and stops it after the second."""
        self._calls += 1
        if self._calls == 1:
            tf.profiler.experimental.start(str(self._folder))
        elif self._calls == 2:
            tf.profiler.experimental.stop()

    def close(self) -> None:
        """Writes the trace of a run that had one call only."""
        if self._calls == 1:
            tf.profiler.experimental.stop()


def _step_writer(names: list[str]) -> Callable[[tf.Tensor, tf.Tensor], None]:
    """Returns a graph that writes a point for each step: no Python between the points."""

    def write(values: tf.Tensor, first: tf.Tensor) -> None:
        def one_step(i: tf.Tensor) -> tuple[tf.Tensor]:
            with tf.name_scope("step/"):  # the slash leaves out "while/", the scope of the loop
                for column, name in enumerate(names):
                    tf.summary.scalar(name, values[i, column], step=first + i)
            return (i + 1,)

        steps = tf.shape(values, out_type=tf.int64)[0]
        tf.while_loop(lambda i: i < steps, one_step, (tf.constant(0, tf.int64),))

    signature = (tf.TensorSpec((None, len(names))), tf.TensorSpec((), tf.int64))
    graph = tf.function(write, input_signature=signature, autograph=False)  # which takes longer
    traced: Callable[[tf.Tensor, tf.Tensor], None] = graph.get_concrete_function()
    return traced


def shown(logs: Logs) -> str:
    """Returns the numbers of an epoch as a person reads them."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scalars(logs).items())


def plain(logs: Logs) -> dict[str, Any]:
    """Returns the metrics as JSON takes them: numbers, lists of numbers, null for no number."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(item) for item in value]
        if not isinstance(value, int | float):  # text that a callback added
            return None if value is None else str(value)
        return value if np.isfinite(value) else None

    return {name: finite(np.asarray(value).tolist()) for name, value in logs.items()}


def scalars(logs: Logs) -> dict[str, float]:
    """Returns the logs that are one number. A metric may have several, and a callback adds any."""
    kinds = (int, float, np.integer, np.floating)
    return {name: float(value) for name, value in logs.items() if isinstance(value, kinds)}
