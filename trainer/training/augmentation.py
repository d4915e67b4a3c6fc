"""Training images altered at random by Keras's preprocessing layers, in the step, on the device."""

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

# Training images that the layers are tried on.
_TRIED_IMAGES = 8
# Smallest share of the contrast, and of the pixels between black and white, that must be left.
_LEAST_CONTRAST = 0.05
_LEAST_TONES = 0.1
# Largest share of images that may lose their contrast: a random layer may erase one.
_MOST_DESTROYED = 0.3
_RANGE = "layers get pixels from 0 to 255 and must return that range (the network scales them)"


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


def make_augmentation(layers: Sequence[KerasObject], data: Dataset) -> Augmentation | None:
    """Makes the function that the loop applies to each batch of training images.

    Random layers draw from generators seeded by `keras.utils.set_random_seed`, so that both data
    paths alter the same batch alike.

    Args:
        layers: Keras layers by name, in order; they see float32 images from 0 to 255.
        data: Its training images are used to try the layers, which must keep the shape.

    Returns:
        The function; None if there are no layers.

    Raises:
        InputError: A layer is unknown, refuses its options, changes the shape, has weights that
            nothing trains, mixes images of different labels, or destroys the images.
    """
    if not layers:
        return None
    made = [keras_objects.make("layer", layer, dtype="float32") for layer in layers]
    for layer in made:
        if isinstance(layer, (keras.layers.MixUp, keras.layers.CutMix)):
            raise _mixing([layer])
    spec = data.spec
    images = data.train.read(slice(0, None, max(1, len(data.train) // _TRIED_IMAGES)))[0]
    try:
        chain = keras.Sequential(made)
        # Trying it also makes its random state, which belongs to the strategy's scope.
        shape = chain(tf.zeros((1, *spec.image_shape)), training=True).shape
        _refuse_weights(chain)
        if tuple(shape[1:]) != spec.image_shape:
            raise InputError(
                f"data.augmentation: expected to keep images of {list(spec.image_shape)}, "
                f"received {list(shape[1:])}"
            )
        _try_on_images(chain, images[:_TRIED_IMAGES])
    except keras_objects.KERAS_ERRORS as error:
        raise InputError(f"data.augmentation: {keras_objects.explain(error)}") from error
    return Augmentation(chain)


def _refuse_weights(chain: keras.Sequential) -> None:
    """Refuses layers with weights: augmentation is neither trained nor adapted to data."""
    for layer in chain.layers:
        layer.trainable = True  # a frozen layer has random weights all the same
        if layer.trainable_weights:
            raise InputError(
                f"data.augmentation: {type(layer).__name__} has weights, which nothing trains: "
                "expected layers without weights (others belong to the network)"
            )
        if layer.weights and hasattr(layer, "adapt"):
            raise InputError(
                f"data.augmentation: {type(layer).__name__} is not adapted to data and changes "
                "nothing: expected its statistics as options, or the layer in the network"
            )


def _try_on_images(chain: keras.Sequential, images: Images) -> None:
    """Refuses layers that destroy images, or that put parts of one image into another.

    The state of the random layers is left as it was.

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

    altered = augment(images)
    if altered.shape != images.shape:
        raise InputError(
            f"data.augmentation ({_names(chain.layers)}): expected as many images as it gets, "
            f"received {len(altered)} for {len(images)}"
        )
    _refuse_destruction(chain.layers, images, altered)
    if not np.array_equal(augment(images), altered):
        return  # it draws other numbers at each call: nothing can be compared
    # One image among black ones, and its inverse: with the same random numbers, a pattern in the
    # difference of a black image comes from it. (An even difference may come from the range of the
    # batch.)
    for place in (0, len(images) // 2):
        black = np.arange(len(images)) != place
        batches = [np.zeros_like(images), np.zeros_like(images)]
        batches[0][place], batches[1][place] = images[place], 255 - images[place]
        difference = (augment(batches[0]) - augment(batches[1]))[black]
        if difference.size and difference.std(axis=(1, 2)).max() > 1:  # grey level, not rounding
            raise _mixing(chain.layers)


def _refuse_destruction(
    layers: Sequence[keras.layers.Layer], images: Images, altered: NDArray[Any]
) -> None:
    """Refuses altered images that are not finite, nearly constant, or mostly out of range."""
    where = f"data.augmentation ({_names(layers)})"
    if not np.isfinite(altered).all():
        raise InputError(f"{where} returns pixels that are not finite: {_RANGE}")
    shown = np.rint(altered).clip(0, 255)
    each_before, each_after = _contrasts(images), _contrasts(shown)
    before, after = float(each_before.mean()), float(each_after.mean())
    destroyed = (each_after < _LEAST_CONTRAST * each_before).mean()
    if after < _LEAST_CONTRAST * before or destroyed > _MOST_DESTROYED:
        raise InputError(
            f"{where} returns pixels from {altered.min():.3g} to {altered.max():.3g}, and nearly "
            f"constant images when they are rounded (standard deviation {after:.2g} of 255; "
            f"{before:.2g} before): {_RANGE}"
        )
    outside = ((altered < -0.5) | (altered > 255.5)).mean()
    tones, tones_left = (((x > 0) & (x < 255)).mean() for x in (images, shown))
    if tones_left < _LEAST_TONES * tones < outside:
        raise InputError(
            f"{where} returns pixels from {altered.min():.3g} to {altered.max():.3g}, which become "
            f"black or white ({tones_left:.0%} of the pixels lie in between; {tones:.0%} before): "
            f"{_RANGE}"
        )


def _contrasts(images: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the standard deviation of the pixels of each image, float64 [n]."""
    deviations: NDArray[np.float64] = images.reshape(len(images), -1).std(axis=1)
    return deviations


def _mixing(layers: Sequence[keras.layers.Layer]) -> InputError:
    return InputError(
        f"data.augmentation: {_names(layers)} mixes images of the batch, but each image keeps its "
        "own label: expected layers that alter one image at a time (for soft labels: "
        "training.loss = 'SmoothedCrossentropy')"
    )


def _names(layers: Sequence[keras.layers.Layer]) -> str:
    return ", ".join(type(layer).__name__ for layer in layers)
