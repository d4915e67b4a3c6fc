"""Augmentation of training images by Keras layers, as part of the step on the device."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer import keras_objects
from trainer.config import KerasObject
from trainer.data import Dataset, Images
from trainer.errors import InputError

# Number of training images that the layers are tested on.
_TRIED_IMAGES = 8
# Smallest fraction of the contrast, and of the pixels between black and white, that must remain.
_MIN_CONTRAST = 0.05
_MIN_TONES = 0.1
# Largest fraction of images that may lose their contrast: a random layer may erase one.
_MAX_DESTROYED = 0.3
_RANGE = "layers get pixels from 0 to 255 and must return that range (the network scales them)"


class Augmentation:
    """A chain of Keras layers that changes uint8 images.

    Attributes:
        layers: The layers, in order.
        variables: State of the random layers.
    """

    def __init__(self, chain: keras.Sequential) -> None:
        """Stores a built chain of layers."""
        self._chain = chain
        self.layers: list[keras.layers.Layer] = chain.layers
        self.variables: list[Any] = chain.variables

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Takes and returns images, uint8 [rows, H, W, C]."""
        changed = self._chain(tf.cast(images, tf.float32), training=True)
        return tf.cast(tf.clip_by_value(tf.round(changed), 0, 255), tf.uint8)


def make_augmentation(layers: Sequence[KerasObject], data: Dataset) -> Augmentation | None:
    """Builds and tests the augmentation that the loop applies to each training batch.

    Random layers use generators seeded by `keras.utils.set_random_seed`, so that resident and
    streamed batches are changed alike.

    Args:
        layers: Keras layers by name, in order. They receive float32 images from 0 to 255.
        data: The layers are tested on some of its training images.

    Returns:
        The augmentation; None if there are no layers.

    Raises:
        InputError: A layer is unknown, refuses its options, changes the shape, has weights that
            would not be trained, mixes images with different labels, or destroys the images.
    """
    if not layers:
        return None
    made = [keras_objects.make("layer", layer, dtype="float32") for layer in layers]
    for layer in made:
        if isinstance(layer, keras.layers.MixUp | keras.layers.CutMix):
            raise _mixes([layer])
    spec, step = data.spec, max(1, len(data.train) // _TRIED_IMAGES)
    images = data.train.read(slice(0, None, step))[0][:_TRIED_IMAGES]
    try:
        chain = keras.Sequential(made)
        # This also creates the state of random layers, which belongs to the strategy's scope.
        shape = chain(tf.zeros((1, *spec.image_shape)), training=True).shape
        _refuse_weights(chain)
        if tuple(shape[1:]) != spec.image_shape:
            raise InputError(
                f"data.augmentation: expected images of shape {list(spec.image_shape)}, "
                f"received {list(shape[1:])}"
            )
        _try_on_images(chain, images)
    except keras_objects.KERAS_ERRORS as error:
        raise InputError(f"data.augmentation: {keras_objects.explain(error)}") from error
    return Augmentation(chain)


def _refuse_weights(chain: keras.Sequential) -> None:
    """Refuses layers with weights: augmentation is neither trained nor adapted to data."""
    for layer in chain.layers:
        where = f"data.augmentation: {type(layer).__name__}"
        layer.trainable = True  # the weights of a frozen layer are random, too
        if layer.trainable_weights:
            raise InputError(
                f"{where} has weights, but augmentation is not trained: expected layers without "
                "weights; put this layer into the network"
            )
        if layer.weights and hasattr(layer, "adapt"):
            raise InputError(
                f"{where} has no statistics, because adapt() is not called: expected its "
                "statistics as options, or the layer in the network"
            )


def _try_on_images(chain: keras.Sequential, images: Images) -> None:
    """Refuses layers that destroy images, or that mix parts of different images.

    The state of the random layers stays unchanged.

    Args:
        chain: The layers, built.
        images: Some training images, uint8 [n, H, W, C].
    """
    state = [keras.ops.convert_to_numpy(variable) for variable in chain.variables]

    def augment(batch: Images) -> NDArray[Any]:
        result = chain(tf.cast(batch, tf.float32), training=True)
        for variable, value in zip(chain.variables, state, strict=True):
            variable.assign(value)
        return np.asarray(keras.ops.convert_to_numpy(result), np.float64)

    changed = augment(images)
    if changed.shape != images.shape:
        raise InputError(
            f"data.augmentation ({_names(chain.layers)}): expected as many images as it gets, "
            f"received {len(changed)} for {len(images)}"
        )
    _refuse_destruction(f"data.augmentation ({_names(chain.layers)})", images, changed)
    if not np.array_equal(augment(images), changed):
        return  # the layers draw different numbers in each call: results cannot be compared
    # Two batches of black images: one also contains an image, the other the inverse of this image.
    # Both get the same random numbers. If the results of a black image differ by a pattern, the
    # pattern comes from the other image. (A constant difference may come from the batch's range.)
    for place in (0, len(images) // 2):
        batches = [np.zeros_like(images), np.zeros_like(images)]
        batches[0][place], batches[1][place] = images[place], 255 - images[place]
        difference = np.delete(augment(batches[0]) - augment(batches[1]), place, axis=0)
        if difference.size and difference.std(axis=(1, 2)).max() > 1:  # more than rounding
            raise _mixes(chain.layers)


def _refuse_destruction(where: str, images: Images, changed: NDArray[Any]) -> None:
    """Refuses changed images that are not finite, nearly constant, or mostly out of range."""
    if not np.isfinite(changed).all():
        raise InputError(f"{where} returns pixels that are not finite: {_RANGE}")
    rounded = np.rint(changed).clip(0, 255)
    contrasts, contrasts_left = (x.std(axis=(1, 2, 3)) for x in (images, rounded))  # [n]
    before, after = contrasts.mean(), contrasts_left.mean()
    destroyed = (contrasts_left < _MIN_CONTRAST * contrasts).mean()
    returns = f"{where} returns pixels from {changed.min():.3g} to {changed.max():.3g}"
    if after < _MIN_CONTRAST * before or destroyed > _MAX_DESTROYED:
        raise InputError(
            f"{returns}, and nearly constant images when they are rounded (standard deviation "
            f"{after:.2g} of 255; {before:.2g} before): {_RANGE}"
        )
    outside = ((changed < -0.5) | (changed > 255.5)).mean()
    tones, tones_left = (((x > 0) & (x < 255)).mean() for x in (images, rounded))
    if tones_left < _MIN_TONES * tones and outside > _MIN_TONES * tones:
        raise InputError(
            f"{returns}, which become black or white ({tones_left:.0%} of the pixels lie in "
            f"between; {tones:.0%} before): {_RANGE}"
        )


def _mixes(layers: Sequence[keras.layers.Layer]) -> InputError:
    return InputError(
        f"data.augmentation: {_names(layers)} mixes images of the batch, but each image keeps its "
        "own label: expected layers that change one image at a time (for soft labels: "
        "training.loss = 'SmoothedCrossentropy')"
    )


def _names(layers: Sequence[keras.layers.Layer]) -> str:
    return ", ".join(type(layer).__name__ for layer in layers)
