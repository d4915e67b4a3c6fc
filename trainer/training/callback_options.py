"""Checks the options of Keras's callbacks before a training begins."""

import inspect
import warnings
from collections.abc import Collection
from typing import Any

import keras

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.errors import InputError, did_you_mean

# They need functions, which a configuration cannot contain.
_NEED_FUNCTIONS = (keras.callbacks.LearningRateScheduler, keras.callbacks.LambdaCallback)


def check_callback(described: KerasObject, logs: Collection[Any]) -> None:
    """Refuses options that Keras would ignore, or would reject only during the training.

    Callbacks of the user are not checked, because they may do anything when they are made.

    Args:
        described: The callback.
        logs: Names of the logs at the end of an epoch.

    Raises:
        InputError: The constructor raises an error or a warning, the callback needs functions, a
            number is given as text, or the monitored log does not exist.
    """
    kind = keras_objects.find("callback", described.name)
    if not kind.__module__.startswith("keras."):
        return
    what, options = f"callback {described.name!r} cannot be used", described.options
    if issubclass(kind, _NEED_FUNCTIONS):
        raise InputError(f"{what}: it needs functions; pass it to trainer.fit(callbacks=...)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            keras_objects.make("callback", described)
    except UserWarning as warning:
        raise InputError(f"{what}: {keras_objects.explain(warning)}") from None
    for name, value in options.items():
        default = inspect.signature(kind).parameters[name].default
        if isinstance(value, str) and isinstance(default, int | float):
            expected = type(default).__name__
            raise InputError(f"{what}: {name}: expected {expected}, received {value!r}")
    monitor = options.get("monitor")
    if monitor is not None and monitor not in logs:
        raise InputError(
            f"{what}: monitor = {monitor!r}: {did_you_mean(str(monitor), logs)} (a callback that "
            "adds a log must come before one that monitors it)"
        )
