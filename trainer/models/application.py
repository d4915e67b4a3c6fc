"""A network of keras.applications, for transfer learning (docs/transfer.md).

    [model]
    name = "application"
    options = { name = "MobileNetV2", weights = "imagenet" }
    freeze = ["mobilenetv2*"]

`build` adds the scaling of the pixels before the network, and a dense layer and a softmax after it.
"""

import inspect
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import keras
import numpy as np
from keras import layers
from pydantic import Field

from trainer import keras_objects
from trainer.data import DataSpec
from trainer.errors import InputError, MissingError, did_you_mean, expect
from trainer.models import class_probabilities

CONTRACT_TESTS_SKIPPED = "tests/models/test_application.py tests it with a few networks"


def build(
    spec: DataSpec,
    *,
    name: str = "MobileNetV2",
    weights: str = "imagenet",
    pooling: Literal["avg", "max"] = "avg",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
    batch_normalization: Literal["frozen", "trained"] = "frozen",
) -> keras.Model:
    """Builds the network. Grayscale images become three equal channels.

    Args:
        spec: Contains the image shape and the class count.
        name: A function of keras.applications. The layer has its name, usually in small letters.
        weights: Initial weights: "imagenet" (downloaded by Keras), "none" (random), or a weights
            file without the classification layers, for example "..._no_top.h5".
        pooling: Average or maximum over all positions of the last feature map.
        dropout: Fraction of the features that training sets to zero.
        batch_normalization: "frozen" uses the statistics of the weights and does not change them,
            also in fine-tuning; "trained" is for training from random weights.
    """
    if name not in available():
        names = did_you_mean(name, available())
        raise InputError(f"model.options.name: unknown application {name!r}: {names}")
    factory = getattr(keras.applications, name)
    images = keras.Input(spec.image_shape, dtype="uint8", name="image")
    x = _preprocess(images, sys.modules[factory.__module__].preprocess_input)
    network = _make_network(factory, x.shape[1:], weights, pooling)
    if batch_normalization == "frozen":
        # Not by `network(x, training=False)`: in Keras 3, the outer model overrides this argument
        # when it is trained (keras-team/keras#20285).
        for layer in keras_objects.nested_layers([network]):
            if isinstance(layer, layers.BatchNormalization):
                layer.trainable = False
    x = layers.Dropout(dropout, name="dropout")(network(x))  # (B, features)
    return keras.Model(images, class_probabilities(x, spec), name="application")


def available() -> list[str]:
    """Returns the names of all networks of keras.applications."""
    functions = inspect.getmembers(keras.applications, inspect.isfunction)
    return [name for name, each in functions if "weights" in inspect.signature(each).parameters]


def scaling(preprocess_input: Any) -> tuple[list[int], list[float], list[float]]:
    """Derives the scaling of the pixels from a function `preprocess_input` of Keras.

    It can change the order of the channels. Then it multiplies and shifts each channel.

    Returns:
        The input channel of each output channel, and the scale and offset of each output channel.
    """
    probes = np.zeros((4, 1, 1, 3))  # black, red, green, blue
    probes[[1, 2, 3], 0, 0, [0, 1, 2]] = 255
    offset, *colors = preprocess_input(probes)[:, 0, 0]
    slopes = (np.stack(colors) - offset) / 255  # [input channel, output channel]
    order = abs(slopes).argmax(axis=0)
    return order.tolist(), slopes[order, [0, 1, 2]].tolist(), offset.tolist()


def _preprocess(images: Any, preprocess_input: Any) -> Any:
    """Scales images, uint8 (B, H, W, 1 or 3), as the network expects them, float32 (B, H, W, 3)."""
    order, scale, offset = scaling(preprocess_input)
    if images.shape[-1] == 1:
        images = layers.Concatenate(name="rgb")([images] * 3)
    elif order != [0, 1, 2]:
        # Crops the last axis to one channel: "channels_first" counts it as the width.
        channels = [
            layers.Cropping2D(((0, 0), (i, 2 - i)), "channels_first", name=f"channel_{i}")(images)
            for i in order
        ]
        images = layers.Concatenate(name="bgr")(channels)
    return layers.Rescaling(scale, offset, dtype="float32", name="scale")(images)


def _make_network(factory: Any, shape: Any, weights: str, pooling: str) -> keras.Model:
    """Calls a function of keras.applications for images of a shape, and loads the weights."""
    name = factory.__name__
    known = weights in ("imagenet", "none") or Path(weights).is_file()
    expect(known, "model.options.weights", '"imagenet", "none" or a weights file', repr(weights))
    try:
        with warnings.catch_warnings(action="ignore"):  # about the image size of the weights
            network = factory(
                include_top=False,
                weights="imagenet" if weights == "imagenet" else None,
                input_shape=shape,
                pooling=pooling,
                # EfficientNetV2 refuses other names; some default names contain the image size.
                name=inspect.signature(factory).parameters["name"].default or name.lower(),
            )
    except ValueError as error:
        advice = ": set data.image_size" if "size must be" in str(error) else ""
        message = f"model.options.name = {name!r}: {keras_objects.explain(error)}{advice}"
        raise InputError(message) from None
    except Exception as error:  # Keras raises this class if a download fails
        if weights != "imagenet":
            raise
        raise MissingError(
            f"model.options.weights = 'imagenet': {keras_objects.explain(error)}: download this "
            "file on a machine with a network, and set model.options.weights to its path"
        ) from None
    if weights not in ("imagenet", "none"):
        try:
            network.load_weights(weights)
        except (*keras_objects.KERAS_ERRORS, zipfile.BadZipFile) as error:
            raise InputError(
                f"model.options.weights: {weights}: expected weights of {name} without "
                f"classification layers (..._no_top.h5): {keras_objects.explain(error)}"
            ) from None
    return network
