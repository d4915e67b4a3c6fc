"""Checkpoints: all state of a training, so that it continues as if it had not been interrupted.

checkpoints/
    step-0000000450.npz   all state after 450 steps; the newest two are kept
    best.weights.h5       weights of the epoch with the lowest validation loss
    final.weights.h5      weights at the end

A checkpoint stores the size of each log. Resuming (`trainer.resuming`) truncates the logs to these
sizes, so that steps that are trained again are not logged twice.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.keras_internals import CALLBACK_ATTRIBUTES
from trainer.keras_objects import nested_layers
from trainer.run import Run
from trainer.training.call import Logs
from trainer.training.callbacks import Callback
from trainer.training.loop import CallRecord, Progress
from trainer.training.signals import Signals
from trainer.training.state import pack_state
from trainer.training.weights import save_weights, write_state

_log = logging.getLogger(__name__)

_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """All state of a training between two calls of the loop.

    The variables have no names, because those that Keras makes differ between processes.
    """

    progress: Progress
    stopped: bool  # by a callback
    fingerprint: str  # of the data
    best_loss: float | None  # the lowest validation loss; None before the first validation
    variables: list[NDArray[Any]]  # values of `all_variables`, in this order
    states: dict[str, dict[str, Any]]  # attributes of callbacks by name
    log_sizes: dict[str, int]  # bytes of each log, by path
    trainable: Sequence[bool] = ()  # each of `nested_layers`; empty in older checkpoints


class Checkpoints(Callback):
    """Writes checkpoints at the start, after each epoch and at intervals, and restores one.

    It must be the last callback: it saves and restores the state of the other callbacks after their
    own `on_epoch_end` and `on_train_begin`.
    """

    def __init__(
        self,
        run: Run,
        *,
        objects: Mapping[str, Any],
        variables: Sequence[Any],
        fingerprint: str,
        every_seconds: float,
        signals: Signals,
    ) -> None:
        """Stores the arguments; nothing is read or written before training begins.

        The plain attributes of `objects` are saved by their names, and the `variables` of the
        augmentation, which do not belong to the model. `every_seconds` is the maximum time between
        checkpoints, rounded up to the end of a call.
        """
        super().__init__()
        self._run, self._objects, self._variables = run, objects, variables
        self._fingerprint, self._every_seconds, self._signals = fingerprint, every_seconds, signals
        self._saved: Checkpoint | None = None
        self._progress, self._last_time = Progress(), 0.0
        self._initial: dict[str, dict[str, Any]] = {}
        self._best_loss: float | None = None

    def continue_from(self, saved: Checkpoint) -> None:
        """Sets the checkpoint that is restored when training begins."""
        self._saved = saved
        for callback in self._objects.values():
            if isinstance(callback, keras.callbacks.CSVLogger):
                callback.append = True  # otherwise it would overwrite its file

    def on_train_begin(self, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Restores the checkpoint, after the other callbacks have reset themselves."""
        self._last_time = time.monotonic()
        for name, callback in self._objects.items():
            self._initial[name] = pack_state(callback, {})
            lost = vars(callback).keys() - self._initial[name].keys() - {*CALLBACK_ATTRIBUTES}
            if lost and type(callback).__module__.partition(".")[0] not in ("keras", "trainer"):
                kind, names = type(callback).__name__, ", ".join(sorted(lost))
                _log.info("callback %s: checkpoints do not save %s", kind, names)
        if self._saved is not None:
            self._restore(self._saved)
        else:
            self._save()  # the training no longer needs the files that it starts from

    def on_call_end(self, record: CallRecord) -> None:
        """Saves after a call if it is time, or if a signal was received."""
        if not np.isfinite(record.loss).all():
            return  # the training cannot continue from here
        step = record.first_step + record.steps - record.epoch * self.params["steps"]
        self._progress = Progress(record.epoch, step, record.logs)
        # All workers of a cluster must save at the same step, because saving is collective.
        due = time.monotonic() - self._last_time >= self._every_seconds
        self._signals.stop_if_received(self._save, due=due)

    def on_test_batch_end(self, batch: int, logs: Logs | None = None) -> None:  # noqa: ARG002
        """Saves between two calls of a validation if a signal was received."""
        self._signals.stop_if_received(self._save)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Saves the state, and the best weights if the validation loss is the lowest so far."""
        loss = (logs or {}).get("val_loss")
        if loss is not None and (self._best_loss is None or loss < self._best_loss):
            self._best_loss = float(loss)
            save_weights(self._run.checkpoints / "best.weights.h5", self.model)
        self._progress = Progress(epoch + 1)
        self._save()
        self._signals.stop_if_received()

    def _save(self) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        states: dict[str, Any] = {}
        for name, each in self._objects.items():
            if isinstance(each, Callback):
                each.flush()
            # Only changed attributes: on_train_begin sets the others again.
            initial, state = self._initial[name], pack_state(each, arrays)
            states[name] = {k: v for k, v in state.items() if k not in initial or initial[k] != v}
        facts = {
            "progress": pack_state(self._progress, arrays),
            "stopped": self.model.stop_training,
            "fingerprint": self._fingerprint,
            "best_loss": self._best_loss,
            "states": states,
            "log_sizes": log_sizes(self._run, self._objects.values()),
            "trainable": [layer.trainable for layer in nested_layers(self.model.layers)],
        }
        for i, variable in enumerate(all_variables(self.model, self._variables)):
            arrays[f"v {i}"] = _value(variable)
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        folder, steps = self._run.checkpoints, int(_value(self.model.optimizer.iterations))
        size = sum(array.nbytes for array in arrays.values())

        def write(partial: Path) -> None:
            np.savez(partial, allow_pickle=False, **arrays)

        write_state(folder / f"step-{steps:010}.npz", write, size)
        for old in sorted(folder.glob("step-*.npz"))[:-_KEPT]:
            old.unlink()
        self._last_time = time.monotonic()

    def _restore(self, saved: Checkpoint) -> None:
        # Outer layers come first: they set their inner layers.
        for layer, flag in zip(nested_layers(self.model.layers), saved.trainable, strict=False):
            layer.trainable = flag
        variables = all_variables(self.model, self._variables)
        for variable, value in zip(variables, saved.variables, strict=True):
            variable.assign(value.view(tf.as_dtype(variable.dtype).as_numpy_dtype))
        for name, state in saved.states.items():
            if name in self._objects:  # TensorBoard may be switched off now
                vars(self._objects[name]).update(state)
        self._best_loss = saved.best_loss
        self.model.stop_training = saved.stopped


def all_variables(model: keras.Model, others: Sequence[Any]) -> list[Any]:
    """Returns each variable of a compiled model once, and the others: those of augmentation."""
    every = [*model.variables, *model.optimizer.variables, *model.metrics_variables, *others]
    return list({id(variable): variable for variable in every}.values())


def _value(variable: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(keras.ops.convert_to_numpy(variable))
    # NumPy has no bfloat16: the bytes are stored, and `_restore` views them as the right type.
    return array if array.dtype.isbuiltin else array.view(f"V{array.itemsize}")


def log_sizes(run: Run, objects: Any = ()) -> dict[str, int]:
    """Returns the bytes of each file that only grows: metrics, TensorBoard, and CSV files."""
    paths = [run.metrics, *run.path.rglob("*.tfevents.*")]
    paths += [Path(o.filename) for o in objects if isinstance(o, keras.callbacks.CSVLogger)]
    return {os.path.relpath(p, run.path): p.stat().st_size for p in paths if p.exists()}
