"""Augmentation of training images by Keras layers, as part of the step on the device."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.data import Dataset
from trainer.errors import InputError, expect

_TRIED_IMAGES = 8
_MIN_CONTRAST = 0.05  # smallest fraction of the images' standard deviation that must remain


class Augmentation:
    """A chain of Keras layers that changes uint8 images.

    Attributes:
        layers: The layers, in order.
        variables: State of the random layers.
    """

    def __init__(self, chain: keras.Sequential) -> None:
        """Stores a built chain of layers."""
        self._chain, self.layers, self.variables = chain, chain.layers, list[Any](chain.variables)

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Takes and returns images, uint8 [rows, H, W, C]."""
        changed = self._chain(tf.cast(images, tf.float32), training=True)
        return tf.cast(tf.clip_by_value(tf.round(changed), 0, 255), tf.uint8)


def make_augmentation(layers: Sequence[KerasObject], data: Dataset) -> Augmentation:
    """Builds the augmentation that the loop applies to each training batch.

    Random layers use generators seeded by `keras.utils.set_random_seed`, so that resident and
    streamed batches are changed alike. All layers receive float32 images from 0 to 255. They are
    applied once to some training images.

    Raises:
        InputError: A layer is unknown, refuses its options, changes the shape, has weights that
            would not be trained, mixes labels, or returns another range of pixels.
    """
    made = [keras_objects.make("layer", layer, dtype="float32") for layer in layers]
    step = max(1, len(data.train) // _TRIED_IMAGES)
    images = data.train.read(slice(0, None, step))[0][:_TRIED_IMAGES]
    try:
        chain = keras.Sequential(made)
        # This also creates the state of random layers, which belongs to the strategy's scope.
        result = chain(tf.cast(images, tf.float32), training=True)
        changed = keras.ops.convert_to_numpy(result)
    except keras_objects.KERAS_ERRORS as error:
        raise InputError(f"data.augmentation: {keras_objects.explain(error)}") from error
    for layer in chain.layers:
        what = f"data.augmentation: {type(layer).__name__}"
        if isinstance(layer, keras.layers.MixUp | keras.layers.CutMix):
            raise InputError(f"{what} mixes images, but each image keeps its own label")
        if layer.trainable_weights or (layer.weights and hasattr(layer, "adapt")):
            raise InputError(f"{what} has weights, but augmentation is not trained or adapted")
    expected, received = f"images of shape {list(images.shape)}", list(changed.shape)
    expect(images.shape == changed.shape, "data.augmentation", expected, received)
    fits = np.rint(changed).clip(0, 255).std() >= _MIN_CONTRAST * images.std()  # False for NaN
    expected = "pixels from 0 to 255, as the layers receive them (the network scales them)"
    span = f"pixels from {changed.min():.3g} to {changed.max():.3g}"
    expect(fits, "data.augmentation", expected, f"{span}, which are nearly constant or not finite")
    return Augmentation(chain)
