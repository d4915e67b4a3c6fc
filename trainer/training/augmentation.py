"""Training images altered at random by Keras's preprocessing layers, in the step, on the device."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.data import DataSpec
from trainer.errors import InputError


class Augmentation:
    """A chain of Keras layers that alters uint8 images.

    Attributes:
        layers: The layers, in order.
        variables: The state of its random layers.
    """

    def __init__(self, chain: keras.Sequential) -> None:
        """Takes the built chain."""
        self._chain = chain
        self.layers: list[keras.layers.Layer] = chain.layers
        self.variables: list[Any] = chain.variables

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Takes and returns images, uint8 [rows, H, W, C]."""
        altered = self._chain(tf.cast(images, tf.float32), training=True)
        return tf.cast(tf.clip_by_value(tf.round(altered), 0, 255), tf.uint8)


def make_augmentation(layers: Sequence[KerasObject], spec: DataSpec) -> Augmentation | None:
    """Makes the function that the loop applies to each batch of training images.

    Random layers draw from generators seeded by `keras.utils.set_random_seed`, so that both data
    paths alter the same batch alike.

    Args:
        layers: Keras layers by name, in order; they see float32 images from 0 to 255.
        spec: Gives the image shape, which the layers must keep.

    Returns:
        What alters the images; None where there are no layers.

    Raises:
        InputError: A layer is unknown, refuses its options or changes the shape.
    """
    if not layers:
        return None
    made = [keras_objects.make("layer", layer, dtype="float32") for layer in layers]
    try:
        chain = keras.Sequential(made)
        # Trying it also makes its random state, which belongs to the strategy's scope.
        shape = chain(tf.zeros((1, *spec.image_shape)), training=True).shape
    except keras_objects.REFUSALS as error:
        raise InputError(f"data.augmentation: {keras_objects.explain(error)}") from error
    if tuple(shape[1:]) != spec.image_shape:
        raise InputError(
            f"data.augmentation: expected to keep images of {list(spec.image_shape)}, "
            f"received {list(shape[1:])}"
        )

    return Augmentation(chain)
