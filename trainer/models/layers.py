"""A network in the configuration: a list of Keras layers.

    [model]
    name = "layers"
    options.layers = [
        { name = "Conv2D", options = { filters = 16, kernel_size = 3, activation = "relu" } },
        { name = "GlobalAveragePooling2D" },
    ]

`build` adds the scaling of the pixels before this list, and a dense layer and a softmax after it.
"""

from typing import Annotated

import keras
from pydantic import Field

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.models import class_probabilities, image_input

_Layers = Annotated[tuple[KerasObject, ...], Field(strict=False, min_length=1)]
_FLATTEN = (KerasObject(name="Flatten"),)


def build(spec: DataSpec, *, layers: _Layers = _FLATTEN) -> keras.Model:
    """Builds the network.

    Args:
        spec: Contains the image shape and the class count.
        layers: Keras layers, or "package.module:Name" of your own, with their options.

    Raises:
        InputError: A layer is unknown, refuses its options or does not fit the one before it.
    """
    images, x = image_input(spec)
    for i, described in enumerate(layers):
        layer = keras_objects.make("layer", described)
        try:
            x = layer(x)
        except keras_objects.KERAS_ERRORS as error:
            raise InputError(
                f"model.options.layers.{i}: {described.name} does not fit its input "
                f"{list(x.shape)}: {keras_objects.explain(error)}"
            ) from error
    if len(x.shape) != 2:
        x = keras.layers.Flatten()(x)
    return keras.Model(images, class_probabilities(x, spec), name="layers")
