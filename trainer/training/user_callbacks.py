"""Makes the callbacks of the user and checks them before the training begins."""

import inspect
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import keras

from trainer import keras_objects
from trainer.config import Config, KerasObject
from trainer.errors import InputError, did_you_mean
from trainer.run import Run
from trainer.training.step import metric_tensors

# Callbacks that need functions, which a configuration cannot contain.
_NEED_FUNCTIONS = (keras.callbacks.LearningRateScheduler, keras.callbacks.LambdaCallback)


def make_callbacks(
    config: Config,
    model: keras.Model,
    folder: Path,
    given: Sequence[keras.callbacks.Callback] = (),
) -> list[keras.callbacks.Callback]:
    """Makes the callbacks of the configuration, and checks them and those given in Python.

    Args:
        config: Names the callbacks.
        model: Compiled; its metrics can be monitored.
        folder: The run directory, which replaces "{run}" in an option.
        given: Callbacks that follow those of the configuration.

    Returns:
        All callbacks, in order.

    Raises:
        InputError: A callback is unknown, its options are refused, or it would fail or damage the
            run during training.
    """
    described = [_in_folder(each, folder) for each in config.training.callbacks]
    kinds = [keras_objects.find("callback", each.name) for each in described]
    for kind in (*kinds, *map(type, given)):
        _check_kind(config, kind)
    results = metric_tensors(model.get_metrics_result())
    logs = [*results, *(f"val_{name}" for name in results)]
    for i, each in enumerate(described):
        # A user's callback may add logs for the callbacks after it.
        own = any(not kind.__module__.startswith("keras.") for kind in kinds[:i])
        _check_options(each, [*logs, each.options.get("monitor")] if own else logs)
    return [*(keras_objects.make("callback", each) for each in described), *given]


def _in_folder(callback: KerasObject, folder: Path) -> KerasObject:
    """Replaces "{run}" by the run directory. Refuses paths of files that the run itself writes."""
    options = {
        key: value.replace("{run}", str(folder)) if isinstance(value, str) else value
        for key, value in callback.options.items()
    }
    for key, value in options.items():
        if isinstance(value, str) and Run(folder).owns(Path(value)):
            raise InputError(f"callback {callback.name!r}: {key} = {value!r} is a file of the run")
    return callback.model_copy(update={"options": options})


def _check_kind(config: Config, kind: type) -> None:
    """Refuses callbacks that would delete files of the user or conflict with the workflow."""
    callbacks, schedule = keras.callbacks, config.optimizer.schedule
    reasons = {
        callbacks.BackupAndRestore: "deletes its folder at the end, with everything in it. It is "
        "not needed: `trainer fit` writes checkpoints, and `--resume` continues from them",
        callbacks.SwapEMAWeights: "is not needed: with use_ema, `trainer fit` scores and saves "
        "the averaged weights itself",
    }
    if schedule is not None:
        reason = (
            f"sets the learning rate, but so does optimizer.schedule = {schedule.name!r}: expected "
            "only one of them; remove the other"
        )
        reasons |= dict.fromkeys(
            (callbacks.ReduceLROnPlateau, callbacks.LearningRateScheduler), reason
        )
    for refused, reason in reasons.items():
        if issubclass(kind, refused):
            raise InputError(f"callback {kind.__name__!r} {reason}")


def _check_options(described: KerasObject, logs: Collection[Any]) -> None:
    """Refuses options that Keras ignores, or rejects only during the training.

    User-defined callbacks are not checked: creating one here could have side effects.

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
