"""A small convolutional network: blocks of convolution, pooling and ReLU, then a dense layer."""

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
    crop: Annotated[int, Field(ge=0)] = 0,
    batch_normalization: bool = False,
) -> keras.Model:
    """Builds the network.

    Args:
        spec: Contains the image shape and the class count.
        filters: Channels of each convolution; a 2x2 max pooling follows each.
        kernel_size: Height and width of the first kernel; the others have 3.
        padding: "valid" is faster; "same" keeps the edges, for small images.
        dense: Units of the hidden dense layer.
        dropout: Fraction of its outputs that training sets to zero.
        crop: Rows and columns removed at each edge of the images, which saves computation.
        batch_normalization: Normalize the hidden layer's outputs before their ReLU, which allows
            larger steps in a training of one epoch (Ioffe and Szegedy 2015).
    """
    images, x = image_input(spec)  # (B, H, W, C)
    if crop:
        x = layers.Cropping2D(crop, name="crop")(x)
    for i, channels in enumerate(filters, start=1):
        size = kernel_size if i == 1 else 3
        x = layers.Conv2D(channels, size, padding=padding, name=f"convolution_{i}")(x)
        x = layers.MaxPooling2D(2, padding="same", name=f"pooling_{i}")(x)  # halves H and W
        # A ReLU before the pooling would have the same result, but four times the work.
        x = layers.ReLU(name=f"relu_{i}")(x)
    x = layers.Flatten(name="flatten")(x)  # (B, H * W * channels)
    x = layers.Dense(dense, use_bias=not batch_normalization, name="hidden")(x)  # (B, dense)
    if batch_normalization:
        # No scale: the weights of the next dense layer can learn it. The momentum is low, because
        # an epoch has only a few hundred steps to learn the averages.
        x = layers.BatchNormalization(scale=False, momentum=0.8, name="normalization")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(images, class_probabilities(x, spec), name="cnn")
