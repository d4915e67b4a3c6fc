"""A multi-layer perceptron: dense layers on the flattened image."""

from typing import Annotated

import keras
from keras import layers
from pydantic import Field

from trainer.data import DataSpec
from trainer.models import class_probabilities, image_input

Size = Annotated[int, Field(ge=1)]


def build(
    spec: DataSpec,
    *,
    units: Annotated[tuple[Size, ...], Field(strict=False)] = (256, 128),
    activation: str = "relu",
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> keras.Model:
    """Builds the network.

    Args:
        spec: Contains the image shape and the class count.
        units: Units of each hidden layer; without any, the network is a logistic regression.
        activation: Activation of the hidden layers, a Keras name.
        dropout: Fraction of each hidden layer's outputs that training sets to zero.
    """
    images, x = image_input(spec)  # (B, H, W, C)
    x = layers.Flatten(name="flatten")(x)  # (B, H * W * C)
    for i, size in enumerate(units, start=1):
        x = layers.Dense(size, activation=activation, name=f"hidden_{i}")(x)
        x = layers.Dropout(dropout, name=f"dropout_{i}")(x)
    return keras.Model(images, class_probabilities(x, spec), name="mlp")
