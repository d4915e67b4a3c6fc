"""Makes the callbacks of the user and checks them before the training begins."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import keras

from trainer import keras_objects
from trainer.config import Config, KerasObject
from trainer.errors import InputError, did_you_mean, expect
from trainer.run import Run
from trainer.training.step import metric_tensors, takes

_CALLBACKS = keras.callbacks
_REFUSED = {
    _CALLBACKS.BackupAndRestore: "deletes its folder at the end: use `trainer fit --resume`",
    _CALLBACKS.SwapEMAWeights: "is not needed: `fit` scores and saves the averaged weights itself",
}


def make_callbacks(
    config: Config,
    model: keras.Model,
    folder: Path,
    given: Sequence[keras.callbacks.Callback] = (),
) -> list[keras.callbacks.Callback]:
    """Makes the callbacks of the configuration, and checks them and those given in Python.

    The run directory `folder` replaces "{run}" in an option. The metrics of the compiled model can
    be monitored. The `given` callbacks follow those of the configuration.

    Raises:
        InputError: A callback is unknown, its options are refused, it monitors an unknown log, or
            it would damage the run or conflict with the workflow.
    """
    refused, schedule = dict(_REFUSED), config.optimizer.schedule
    if schedule is not None:
        reason = f"sets the learning rate, but so does optimizer.schedule = {schedule.name!r}"
        refused[_CALLBACKS.ReduceLROnPlateau] = refused[_CALLBACKS.LearningRateScheduler] = reason
    described = [_in_folder(each, folder) for each in config.training.callbacks]
    made = [keras_objects.make("callback", each) for each in described]
    for callback in (*made, *given):
        for kind, reason in refused.items():
            if isinstance(callback, kind):
                raise InputError(f"callback {type(callback).__name__!r} {reason}")
        _check_methods(callback)
    results = metric_tensors(model.get_metrics_result())
    logs = [*results, *(f"val_{name}" for name in results)]
    for each, callback in zip(described, made, strict=True):
        if not type(callback).__module__.startswith("keras."):
            break  # a user's callback may add logs for the callbacks after it
        monitor = each.options.get("monitor")
        if monitor is not None and monitor not in logs:
            what = f"callback {each.name!r}: monitor = {monitor!r}"
            order = "a callback that adds a log must come before one that monitors it"
            raise InputError(f"{what}: {did_you_mean(str(monitor), logs)} ({order})")
    return [*made, *given]


def _check_methods(callback: keras.callbacks.Callback) -> None:
    """Refuses methods that cannot be called as Keras and the loop call them."""
    for name in dir(callback):
        if name.startswith("on_"):
            count = 2 if "_batch_" in name or "_epoch_" in name else 1
            where = f"callback {type(callback).__name__!r}: {name}"
            fits = takes(getattr(callback, name), count)
            expect(fits, where, f"{count} arguments", inspect.signature(getattr(callback, name)))


def _in_folder(callback: KerasObject, folder: Path) -> KerasObject:
    """Replaces "{run}" by the run directory. Refuses paths of files that the run itself writes.

    A Keras callback would also write to the run directory itself; your own class may receive it.
    """
    allowed = folder if ":" in callback.name else None
    options = {
        key: value.replace("{run}", str(folder)) if isinstance(value, str) else value
        for key, value in callback.options.items()
    }
    for key, value in options.items():
        if isinstance(value, str) and Path(value) != allowed and Run(folder).owns(Path(value)):
            raise InputError(f"callback {callback.name!r}: {key} = {value!r} is a file of the run")
    return callback.model_copy(update={"options": options})
