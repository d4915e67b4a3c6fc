"""Finds and makes the Keras objects that a configuration names: layers, optimizers and so on."""

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from trainer.config import KerasObject
from trainer.errors import InputError, MissingError, did_you_mean, explain_user_code

# What Keras and TensorFlow raise for options they cannot work with, early or late.
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
    """Returns the class that a name of a configuration means.

    Args:
        kind: "layer", "loss", "metric", "optimizer", "schedule" or "callback".
        name: A Keras name in any case ("adam", "Conv2D"), one of this package
            ("SmoothedCrossentropy"), the name a class was registered under with
            `keras.saving.register_keras_serializable`, or "package.module:Name".

    Raises:
        InputError: There is no such class, or it is of another kind.
    """
    module, base = _KINDS[kind]
    if ":" in name:
        found = import_object(kind, name)
    else:
        classes = {
            n: c for n, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, base)
        }
        classes |= {  # of this package
            key.removeprefix("trainer>"): c
            for key, c in keras.saving.get_custom_objects().items()
            if key.startswith("trainer>") and inspect.isclass(c) and issubclass(c, base)
        }
        lower = {n.lower(): c for n, c in classes.items()}
        registered = keras.saving.get_registered_object(name)
        found = classes.get(name) or lower.get(name.lower()) or registered
        if found is None:
            raise InputError(f"unknown {kind} {name!r}: {did_you_mean(name, classes)}")
    if kind == "loss" and inspect.isfunction(found):
        return lambda: found  # Keras takes a function of labels and outputs for a loss
    if not (inspect.isclass(found) and issubclass(found, base)):
        received = getattr(found, "__name__", repr(found))
        raise InputError(
            f"{kind} {name!r}: expected a subclass of keras {base.__name__}, received {received}"
        )
    return found


def make(kind: str, config: KerasObject, **defaults: Any) -> Any:
    """Makes the object that a configuration describes.

    Args:
        kind: As `find` takes it.
        config: Its name and the keyword arguments of its constructor.
        defaults: Keyword arguments used where the configuration leaves them out.

    Raises:
        InputError: The name is unknown or the constructor refuses the options.
    """
    return call(find(kind, config.name), f"{kind} {config.name!r}", defaults | config.options)


def call(factory: Any, what: str, options: dict[str, Any]) -> Any:
    """Calls `factory(**options)`; a refusal of the options becomes one line that says `what`.

    Raises:
        InputError: The factory does not take these options.
        MissingError: It needs a package that is not installed.
    """
    try:
        return factory(**options)
    except ImportError as error:  # of a package that Keras itself does without
        raise MissingError(f"{what}: {error}") from None
    except KERAS_ERRORS as error:
        reason = explain(error)
        shown = ", ".join(f"{key!r}: {_shown(value)}" for key, value in options.items())
        raise InputError(f"{what} refuses the options {{{shown}}}: {reason}") from error


def _shown(value: Any) -> str:
    """Returns an option as a person wrote it; of an object of Keras's, its class."""
    plain = isinstance(value, (str, int, float, list, tuple, dict, type(None)))
    return repr(value) if plain else type(value).__name__


def compiled_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Returns the metrics of a model, those that Keras holds in one for `compile` among them."""
    return [inner for metric in model.metrics for inner in getattr(metric, "metrics", [metric])]


def nested_layers(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Returns layers and those that are attributes of them, at any depth."""
    found: dict[int, keras.layers.Layer] = {}
    waiting = list(layers)
    while waiting:
        layer = waiting.pop()
        if id(layer) in found:
            continue
        found[id(layer)] = layer
        for value in vars(layer).values():
            parts = value if isinstance(value, list | tuple) else [value]
            waiting += [part for part in parts if isinstance(part, keras.layers.Layer)]
    return list(found.values())


def explain(error: Exception) -> str:
    """Returns the reason of an error, short and without internal names.

    If it was raised in code of the user, the reason names its type, file and line.
    """
    in_user_code = explain_user_code(error)
    if in_user_code is not None:
        return in_user_code
    reason = re.sub(r"\{\{.*?\}\} ?", "", " ".join(str(error).split()))
    reason = re.sub(r"^Graph execution error: .*<stack traces unavailable> ", "", reason)
    reason = re.sub(r"( \[\[.*?\]\])? \[Op:\w+\]$", "", reason)
    return reason[:300] or type(error).__name__


def import_object(kind: str, name: str) -> Any:
    """Returns the object "package.module:Name"; `kind` is named in the message of an InputError."""
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise InputError(f"{kind} {name!r}: expected package.module:Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = "the folder you are in and the installed packages"
        raise InputError(f"{kind} {name!r}: {error} (looked for in {where})") from None
    if not hasattr(module, attribute):
        raise InputError(f"{kind} {name!r}: {module_name} has no {attribute!r}")
    return getattr(module, attribute)
