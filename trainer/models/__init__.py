"""Networks: `build(config, spec)` gives a `keras.Model` from raw images to class probabilities.

A network of your own is one module in this folder. Its file name is the name that `[model] name`
takes; its function `build(spec, **options)` returns a `keras.Model` that takes uint8 images of
`spec.image_shape` and returns `spec.class_count` probabilities. Nothing is registered anywhere.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import Any, cast

import keras
import tensorflow as tf

from trainer import keras_objects
from trainer.config import ModelConfig, call_with_options
from trainer.data import DataSpec
from trainer.errors import InputError, did_you_mean

# What TensorFlow takes for the name of a scope.
_SCOPE = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")


def names() -> list[str]:
    """Returns the networks that are modules of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(config: ModelConfig) -> Callable[..., Any]:
    """Returns the function that builds the network which a configuration names.

    Raises:
        InputError: There is no such module, or it has no such function.
    """
    if config.name not in names():
        raise InputError(f"unknown model {config.name!r}: {did_you_mean(config.name, names())}")
    module = importlib.import_module(f"{__name__}.{config.name}")
    function = getattr(module, "build", None)
    if not callable(function):
        raise InputError(f"{module.__file__}: expected a function build(spec, **options)")
    return cast("Callable[..., Any]", function)


def resolve(config: ModelConfig) -> ModelConfig:
    """Returns a configuration that records the default options of its network, too.

    Raises:
        InputError: As `find`.
    """
    return config.resolved(find(config))


def build(config: ModelConfig, spec: DataSpec) -> keras.Model:
    """Builds the network that a configuration names, for the images of a data set.

    Args:
        config: Names a module of this folder and the keyword arguments of its `build`.
        spec: Gives the image shape and the class count.

    Returns:
        A model from images (uint8 [batch, height, width, channels], 0 to 255) to probabilities
        (float32 [batch, classes], each row summing to 1).

    Raises:
        InputError: The network or one of its options is unknown or does not fit the images.
    """
    function = find(config)
    try:
        model = call_with_options(function, spec, options=config.arguments, where="model.options")
    except (tf.errors.ResourceExhaustedError, MemoryError):
        raise InputError(
            f"model {config.name!r} does not fit into memory: lower its options"
        ) from None
    except keras_objects.KERAS_ERRORS as error:
        reason = keras_objects.explain(error)
        raise InputError(f"model {config.name!r} cannot be built: {reason}") from error
    if not isinstance(model, keras.Model) or not model.built:
        raise InputError(
            f"model {config.name!r}: expected build() to return a built keras.Model, "
            f"received {type(model).__name__}"
        )
    strange = [layer.name for layer in model.layers if not _SCOPE.fullmatch(layer.name)]
    if strange:
        raise InputError(
            f"model {config.name!r}: expected names of layers that TensorFlow's graphs take "
            f"(letters, digits, _ . - /, no blanks), received {strange[0]!r}"
        )
    shape = getattr(model, "input_shape", None)
    if shape != (None, *spec.image_shape):
        raise InputError(
            f"model {config.name!r}: expected one input of {[None, *spec.image_shape]}, "
            f"received {shape}"
        )
    outputs = model.compute_output_spec(model.input)
    if not isinstance(outputs, keras.KerasTensor):
        raise InputError(
            f"model {config.name!r}: expected one output of shape [None, {spec.class_count}], "
            f"received a {type(outputs).__name__} of outputs"
        )
    if model.output_shape != (None, spec.class_count):
        raise InputError(
            f"model {config.name!r}: expected probabilities of shape [None, {spec.class_count}], "
            f"received {list(model.output_shape)}"
        )
    return model


def image_input(spec: DataSpec) -> tuple[Any, Any]:
    """Starts a functional model: raw images, and the same scaled to [0, 1].

    The scaling is part of the model, so that what is exported takes the images of a file.

    Returns:
        The input (uint8 [batch, height, width, channels]) and the scaled images (the compute dtype
        of the dtype policy, same shape).
    """
    images = keras.Input(spec.image_shape, dtype="uint8", name="image")
    return images, keras.layers.Rescaling(1 / 255, name="scale")(images)


def class_probabilities(features: Any, spec: DataSpec) -> Any:
    """Ends a functional model: a dense layer to the classes and a softmax.

    The softmax is float32 under every dtype policy: a cross-entropy in 8 bits of mantissa would
    lose the small probabilities.

    Args:
        features: [batch, n].
        spec: Gives the number of classes.

    Returns:
        Probabilities, float32 [batch, classes].
    """
    logits = keras.layers.Dense(spec.class_count, name="logits")(features)
    return keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
