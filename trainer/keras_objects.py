"""Creates Keras objects by name: layers, losses, metrics, optimizers, schedules, callbacks."""

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from trainer.config import KerasObject
from trainer.errors import InputError, MissingError, did_you_mean, expect, explain_user_code

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
        kind: "layer", "loss", "metric", "optimizer", "schedule" or "callback".
        name: A Keras name in any case ("adam", "Conv2D"), one of this package
            ("SmoothedCrossentropy"), the name of a class registered with
            `keras.saving.register_keras_serializable`, or "package.module:Name".

    Raises:
        InputError: There is no such class, or it is of another kind.
    """
    module, base = _KINDS[kind]

    def fits(value: Any) -> bool:
        return inspect.isclass(value) and issubclass(value, base)

    if ":" in name:
        found = import_object(kind, name)
    else:
        # The package of our own classes can be omitted.
        ours = {k.removeprefix("trainer>"): c for k, c in keras.saving.get_custom_objects().items()}
        classes = {n: c for n, c in (vars(module) | ours).items() if fits(c) and ">" not in n}
        lower = {n.lower(): c for n, c in classes.items()}
        registered = keras.saving.get_registered_object(name)
        found = classes.get(name) or lower.get(name.lower()) or registered
        if found is None:
            raise InputError(f"unknown {kind} {name!r}: {did_you_mean(name, classes)}")
    if kind == "loss" and inspect.isfunction(found):
        return lambda: found  # Keras also accepts a function of labels and outputs as a loss
    expected, received = f"a subclass of keras {base.__name__}", getattr(found, "__name__", found)
    expect(fits(found), f"{kind} {name!r}", expected, received)
    return found


def make(kind: str, config: KerasObject, **defaults: Any) -> Any:
    """Creates the object that a configuration describes.

    Args:
        kind: As in `find`.
        config: The name and the keyword arguments of the constructor.
        defaults: Keyword arguments that the configuration overrides.
    """
    return call(find(kind, config.name), f"{kind} {config.name!r}", defaults | config.options)


def call(factory: Any, what: str, options: dict[str, Any]) -> Any:
    """Calls `factory(**options)`. Raises its errors again as one line that starts with `what`."""
    try:
        return factory(**options)
    except ImportError as error:  # an optional package of Keras
        raise MissingError(f"{what}: {error}") from None
    except KERAS_ERRORS as error:
        plain = (str, int, float, list, tuple, dict, type(None))
        shown = ", ".join(  # Keras objects are shown by class
            f"{key!r}: {repr(value) if isinstance(value, plain) else type(value).__name__}"
            for key, value in options.items()
        )
        raise InputError(f"{what} refuses the options {{{shown}}}: {explain(error)}") from error


def import_object(what: str, name: str) -> Any:
    """Returns the object with the name "package.module:Name"; `what` is for messages."""
    module_name, _, attribute = name.partition(":")
    if not module_name or module_name.startswith("."):
        raise InputError(f"{what} {name!r}: expected package.module:Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        where = "the current folder and the installed packages"
        raise InputError(f"{what} {name!r}: {error} (searched in {where})") from None
    if not hasattr(module, attribute):
        raise InputError(f"{what} {name!r}: {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def compiled_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Returns the metrics of a model, with those of `compile`, which Keras stores in one."""
    return [inner for metric in model.metrics for inner in getattr(metric, "metrics", [metric])]


def nested_layers(layers: Iterable[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Returns layers and the layers in their attributes, at any depth."""
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
    """Returns the message of an error, shortened and without internal names.

    For an error in the user's code, the reason contains its type, file and line.
    """
    in_user_code = explain_user_code(error)
    if in_user_code is not None:
        return in_user_code
    reason = re.sub(r"\{\{.*?\}\} ?", "", " ".join(str(error).split()))
    reason = re.sub(r"^Graph execution error: .*<stack traces unavailable> ", "", reason)
    reason = re.sub(r"( \[\[.*?\]\])? \[Op:\w+\]$", "", reason)
    return reason[:300] or type(error).__name__
