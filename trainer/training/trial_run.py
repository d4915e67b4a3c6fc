"""Tries Keras's callbacks on a small network: wrong options show before a training begins."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.errors import InputError, did_you_mean

# Options that name a file or folder: the trial writes elsewhere.
_PATHS = ("filepath", "filename", "log_dir")
_EPOCHS, _BATCHES = 3, 2


def try_callback(described: KerasObject, model: keras.Model, logs: Mapping[str, Any]) -> None:
    """Runs a callback of Keras through three short epochs of a small network.

    Callbacks of a user's own are left out: they may do anything when they are called. So is
    RemoteMonitor, which sends what it receives.

    Args:
        described: The callback.
        model: Compiled; gives the metrics.
        logs: What the callback will find at the end of an epoch.

    Raises:
        InputError: Keras raises an error, or warns that it ignores an option.
    """
    kind = keras_objects.find("callback", described.name)
    if not kind.__module__.startswith("keras.") or kind is keras.callbacks.RemoteMonitor:
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        # TensorBoard's callback replaces these two, and would not put them back after an error.
        tf.summary.create_file_writer(folder).as_default(step=0),
        tf.summary.record_if(condition=True),
    ):
        warnings.simplefilter("error", UserWarning)
        try:
            keras_objects.make("callback", described)  # whose message names the user's own paths
            moved = _elsewhere(described.options, Path(folder))
            _run([kind(**moved)], _small_network(model), logs)
        except (*keras_objects.KERAS_ERRORS, UserWarning) as error:
            reason, monitor = keras_objects.explain(error), described.options.get("monitor")
            if isinstance(monitor, str) and monitor not in logs:
                reason = (
                    f"monitor = {monitor!r}: {did_you_mean(monitor, logs)} (a callback that adds a "
                    "log must come before one that monitors it)"
                )
            raise InputError(f"callback {described.name!r} cannot be used: {reason}") from None


def _elsewhere(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the options with every path moved into a folder, and without profiling."""
    moved = {
        key: str(folder / Path(value).name) if key in _PATHS and isinstance(value, str) else value
        for key, value in options.items()
    }
    return moved | ({"profile_batch": 0} if "profile_batch" in moved else {})


def _small_network(model: keras.Model) -> keras.Model:
    """Returns a network with the metrics of another: callbacks ask them for their direction."""
    small = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="dense")])
    metrics = [metric for metric in keras_objects.compiled_metrics(model) if metric.name != "loss"]
    copies = [type(metric).from_config(metric.get_config()) for metric in metrics]
    small.compile(keras.optimizers.SGD(), "mse", metrics=copies, jit_compile=False)
    small.optimizer.build(small.trainable_variables)
    with contextlib.suppress(ValueError):  # metrics of other outputs: their names are known by now
        small.compute_metrics(None, np.zeros((1, 1)), np.zeros((1, 1)))
    return small


def _run(
    callbacks: Sequence[keras.callbacks.Callback], model: keras.Model, logs: Mapping[str, Any]
) -> None:
    """Calls every method as a training does."""
    training = {name: value for name, value in logs.items() if not name.startswith("val_")}
    hooks = keras.callbacks.CallbackList(
        list(callbacks), model=model, epochs=_EPOCHS, steps=_BATCHES, verbose=0
    )
    model.stop_training = False
    hooks.on_train_begin()
    for epoch in range(_EPOCHS):
        hooks.on_epoch_begin(epoch)
        for batch in range(_BATCHES):
            hooks.on_train_batch_begin(batch)
            hooks.on_train_batch_end(batch, training)
        hooks.on_test_begin()
        hooks.on_test_batch_begin(0)
        hooks.on_test_batch_end(0, training)
        hooks.on_test_end(training)
        hooks.on_epoch_end(epoch, dict(logs))
    hooks.on_train_end(dict(logs))
