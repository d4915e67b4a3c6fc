"""Networks: `build(config, spec)` returns a `keras.Model` from raw images to class probabilities.

To add a network, add one module to this folder. Its file name is the value of `[model] name`. Its
function `build(spec, **options)` returns a `keras.Model` that takes uint8 images of
`spec.image_shape` and returns `spec.class_count` probabilities. There is no registry.

An option `weights` is the initial weights: for example a file, or "none" for random ones. A run
that is restored or resumed does not need them: `build` receives "none".
"""

import pkgutil
import re
from collections.abc import Callable
from typing import Any, cast

import keras

from trainer import keras_objects
from trainer.config import ModelConfig, call_with_options
from trainer.data import DataSpec, module_function
from trainer.errors import InputError, did_you_mean, expect


def names() -> list[str]:
    """Returns the names of the networks that are modules of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(config: ModelConfig) -> Callable[..., Any]:
    """Returns the function that builds the network of a configuration."""
    if config.name not in names():
        raise InputError(f"unknown model {config.name!r}: {did_you_mean(config.name, names())}")
    return module_function(__name__, config.name, "build")


def build(config: ModelConfig, spec: DataSpec, *, initialize: bool = True) -> keras.Model:
    """Builds the network of a configuration for the images of a data set, with its frozen layers.

    Without `initialize`, its initial weights are random, because others are loaded later.

    Returns:
        A model from images (uint8 [batch, height, width, channels], 0 to 255) to probabilities
        (float32 [batch, classes], each row sums to 1).

    Raises:
        InputError: The network or one of its options is unknown or does not fit the images.
    """
    function, where, options = find(config), f"model {config.name!r}", config.arguments
    if not initialize and "weights" in options:
        options["weights"] = "none"
    try:
        model = call_with_options(function, spec, options=options, where="model.options")
    except keras_objects.KERAS_ERRORS as error:
        raise InputError(f"{where} cannot be built: {keras_objects.explain(error)}") from error
    built = isinstance(model, keras.Model) and model.built
    expect(built, where, "build() to return a built keras.Model", type(model).__name__)
    for layer in model.layers:
        rule = "layer names of letters, digits and _ . - / (no spaces)"  # TensorFlow requires it
        expect(re.fullmatch(r"[A-Za-z0-9.][\w./>-]*", layer.name), where, rule, repr(layer.name))
    shape, wanted = getattr(model, "input_shape", None), (None, *spec.image_shape)
    expect(shape == wanted, where, f"one input of shape {list(wanted)}", shape)
    # `model.output_shape` would hide that the model returns a dictionary or a list.
    outputs = model.compute_output_spec(model.input)
    found = list(getattr(outputs, "shape", [type(outputs).__name__]))
    expected = [None, spec.class_count]
    expect(found == expected, where, f"probabilities of shape {expected}", found)
    if config.freeze:
        from trainer.models._freezing import freeze

        freeze(model, config.freeze)
    return cast("keras.Model", model)


def image_input(spec: DataSpec) -> tuple[Any, Any]:
    """Starts a functional model with raw images and the same images scaled to [0, 1].

    Scaling is part of the model, so an exported model takes the pixels of an image file.

    Returns:
        The input (uint8 [batch, height, width, channels]) and the scaled images (the compute dtype
        of the dtype policy, same shape).
    """
    images = keras.Input(spec.image_shape, dtype="uint8", name="image")
    return images, keras.layers.Rescaling(1 / 255, name="scale")(images)


def class_probabilities(features: Any, spec: DataSpec) -> Any:
    """Adds a dense layer to the classes and a softmax to features [batch, n].

    Returns:
        Probabilities, float32 [batch, classes] with every dtype policy, because bfloat16 would lose
        small probabilities.
    """
    logits = keras.layers.Dense(spec.class_count, name="logits")(features)
    return keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
