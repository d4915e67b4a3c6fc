"""Training images altered at random by Keras's preprocessing layers, in the step, on the device."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.data import DataSpec
from trainer.errors import InputError


def make_augmentation(
    layers: Sequence[KerasObject], spec: DataSpec
) -> Callable[[tf.Tensor], tf.Tensor] | None:
    """Makes the function that the loop applies to each batch of training images.

    Random layers draw from generators seeded by `keras.utils.set_random_seed`, so that both data
    paths alter the same batch alike.

    Args:
        layers: Keras layers by name, in order; they see float32 images from 0 to 255.
        spec: Gives the image shape, which the layers must keep.

    Returns:
        A function from uint8 [rows, H, W, C] to the same; None where there are no layers.

    Raises:
        InputError: A layer is unknown, refuses its options or changes the shape.
    """
    if not layers:
        return None
    chain = keras.Sequential(
        [keras_objects.make("layer", layer, dtype="float32") for layer in layers]
    )
    try:
        # Trying it also makes its random state, which belongs to the strategy's scope.
        shape = chain(tf.zeros((1, *spec.image_shape)), training=True).shape
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise InputError(f"data.augmentation: {error}") from None
    if tuple(shape[1:]) != spec.image_shape:
        raise InputError(
            f"data.augmentation: expected to keep images of {list(spec.image_shape)}, "
            f"received {list(shape[1:])}"
        )

    def augment(images: tf.Tensor) -> tf.Tensor:
        altered = chain(tf.cast(images, tf.float32), training=True)
        return tf.cast(tf.clip_by_value(tf.round(altered), 0, 255), tf.uint8)

    return augment
