"""Creates Keras objects by name: layers, losses, metrics, optimizers, schedules, callbacks."""

import importlib
import inspect
import math
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from pydantic import ValidationError

from trainer.config import KerasObject, explain_invalid
from trainer.errors import InputError, MissingError, did_you_mean, expect, explain_user_code, reason

# Errors that Keras and TensorFlow raise for wrong options.
KERAS_ERRORS = (
    *(TypeError, ValueError, NotImplementedError, AttributeError, IndexError, KeyError, OSError),
    tf.errors.OpError,
)

_KINDS = {
    "layer": (keras.layers, keras.layers.Layer),
    "loss": (keras.losses, keras.losses.Loss),
    "metric": (keras.metrics, keras.metrics.Metric),
    "optimizer": (keras.optimizers, keras.optimizers.Optimizer),
    "schedule": (keras.optimizers.schedules, keras.optimizers.schedules.LearningRateSchedule),
    "callback": (keras.callbacks, keras.callbacks.Callback),
}


def find(kind: str, name: str) -> Any:
    """Returns the class that a configuration names.

    Args:
        kind: A key of `_KINDS`.
        name: A Keras name in any case ("adam", "Conv2D"), one of this package
            ("SmoothedCrossentropy"), the name of a class registered with
            `keras.saving.register_keras_serializable`, or "package.module:Name".

    Raises:
        InputError: There is no such class, or it is of another kind.
    """
    module, base = _KINDS[kind]
    if ":" in name:
        found = import_object(kind, name)
        if kind == "loss" and inspect.isfunction(found):
            return lambda: found  # Keras also accepts a function of labels and outputs as a loss
        fits = inspect.isclass(found) and issubclass(found, base)
        expect(fits, f"{kind} {name!r}", f"a subclass of keras {base.__name__}", found)
        return found
    registered = keras.saving.get_custom_objects().items()
    # The package of our own classes can be omitted.
    classes = vars(module) | {key.removeprefix("trainer>"): value for key, value in registered}
    classes = {n: c for n, c in classes.items() if inspect.isclass(c) and issubclass(c, base)}
    lower = {n.lower(): c for n, c in classes.items()}
    if name not in classes and name.lower() not in lower:
        raise InputError(f"unknown {kind} {name!r}: {did_you_mean(name, classes)}")
    return classes.get(name) or lower[name.lower()]


def make(kind: str, config: KerasObject, **defaults: Any) -> Any:
    """Creates the object of a kind (see `find`) that a configuration describes.

    `defaults` are keyword arguments that the configuration overrides.
    """
    return call(find(kind, config.name), f"{kind} {config.name!r}", defaults | config.options)


def call(factory: Any, what: str, options: dict[str, Any]) -> Any:
    """Calls `factory(**options)`. Raises its errors again as one line that starts with `what`."""
    try:
        return factory(**options)
    except ImportError as error:  # an optional package of Keras
        raise MissingError(f"{what}: {error}") from None
    except KERAS_ERRORS as error:
        raise InputError(f"{what} refuses the options {options}: {explain(error)}") from error


def import_object(what: str, name: str) -> Any:
    """Returns the object with the name "package.module:Name"; `what` is for messages."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        where = "the current folder and the installed packages"
        raise InputError(f"{what} {name!r}: {explain(error)} (searched in {where})") from error
    if not hasattr(module, attribute):
        raise InputError(f"{what} {name!r}: {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def compiled_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Returns the metrics of a model, with those of `compile`, which Keras stores in one."""
    return [inner for metric in model.metrics for inner in getattr(metric, "metrics", [metric])]


def nested_layers(layers: Iterable[keras.layers.Layer]) -> dict[keras.layers.Layer, str]:
    """Returns layers and the layers in their attributes, with paths of names as "block/conv"."""
    found: dict[keras.layers.Layer, str] = {}
    waiting = [(layer, layer.name) for layer in layers]
    while waiting:
        layer, path = waiting.pop()
        if layer not in found:
            found[layer] = path
            for value in vars(layer).values():
                parts = value if isinstance(value, list | tuple) else [value]
                inner = [part for part in parts if isinstance(part, keras.layers.Layer)]
                waiting += [(part, f"{path}/{part.name}") for part in inner]
    return found


def count_trainable(model: keras.Model) -> int:
    """Returns the number of parameters that are trained."""
    return sum(math.prod(weight.shape) for weight in model.trainable_variables)


def raised_in_keras_callback(error: Exception) -> bool:
    """Returns whether an error was raised in a callback of Keras, for example by a wrong option."""
    folder = Path(inspect.getfile(keras.callbacks.Callback)).parent
    files = [Path(call.filename) for call in traceback.extract_tb(error.__traceback__)]
    # All callbacks are called through CallbackList.
    return any(file.parent == folder and file.stem != "callback_list" for file in files)


def explain(error: Exception) -> str:
    """Returns the message of an error; in the user's code, also its type, file and line."""
    if isinstance(error, ValidationError):
        return explain_invalid(error)
    return explain_user_code(error) or reason(error)[:300] or type(error).__name__
