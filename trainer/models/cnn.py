"""A small convolutional network: (convolution, ReLU, pooling) a few times, then a dense layer."""

from typing import Annotated, Literal

import keras
from keras import layers
from pydantic import Field

from trainer.data import DataSpec
from trainer.models import class_probabilities, image_input

Size = Annotated[int, Field(ge=1)]


def build(
    spec: DataSpec,
    *,
    filters: Annotated[tuple[Size, ...], Field(strict=False, min_length=1)] = (16, 32),
    kernel_size: Size = 5,
    padding: Literal["valid", "same"] = "valid",
    dense: Size = 128,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> keras.Model:
    """Builds the network.

    Args:
        spec: Gives the image shape and the class count.
        filters: Channels of each convolution; each is followed by a 2x2 max pooling.
        kernel_size: Height and width of the first convolution's kernel; the others have 3.
        padding: "valid" computes only where the kernel fits, which is quicker; "same" keeps the
            edges, for images that "valid" would shrink to nothing.
        dense: Units of the hidden dense layer.
        dropout: Share of its outputs that training sets to zero.
    """
    images, x = image_input(spec)  # (B, H, W, C)
    for i, channels in enumerate(filters, start=1):
        size = kernel_size if i == 1 else 3
        convolution = layers.Conv2D(
            channels, size, padding=padding, activation="relu", name=f"convolution_{i}"
        )
        x = convolution(x)  # (B, H, W, channels)
        x = layers.MaxPooling2D(2, padding="same", name=f"pooling_{i}")(x)  # halves H and W
    x = layers.Flatten(name="flatten")(x)  # (B, H * W * channels)
    x = layers.Dense(dense, activation="relu", name="hidden")(x)  # (B, dense)
    x = layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(images, class_probabilities(x, spec), name="cnn")
