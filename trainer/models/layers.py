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
from trainer.models import class_probabilities, image_input

_Layers = Annotated[tuple[KerasObject, ...], Field(strict=False, min_length=1)]
_FLATTEN = (KerasObject(name="Flatten"),)


def build(spec: DataSpec, *, layers: _Layers = _FLATTEN) -> keras.Model:
    """Builds the network.

    Args:
        spec: Contains the image shape and the class count.
        layers: Keras layers, or "package.module:Name" of your own, with their options.
    """
    images, x = image_input(spec)
    for described in layers:
        x = keras_objects.make("layer", described)(x)
    if len(x.shape) != 2:
        x = keras.layers.Flatten()(x)
    return keras.Model(images, class_probabilities(x, spec), name="layers")
