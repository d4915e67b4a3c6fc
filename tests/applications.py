"""Weights files of keras.applications, in the format that Keras downloads."""

from pathlib import Path

import h5py
import keras
import numpy as np


def write_no_top(path: Path, name: str = "MobileNetV2") -> keras.Model:
    """Writes random weights that pass on what they see; returns the network.

    The statistics of each batch normalization are those of random images. The file has the legacy
    format: the weights of each layer, in the order of the layers.
    """
    keras.utils.set_random_seed(0)
    network = getattr(keras.applications, name)(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    normalizations = [
        layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    for layer in normalizations:
        layer.momentum = 0.0
    network(np.random.RandomState(0).uniform(-1, 1, (32, 32, 32, 3)), training=True)
    whole = path.with_name("whole.h5")
    network.save(whole)
    with h5py.File(whole, "r") as source, h5py.File(path, "w") as target:
        weights = source["model_weights"]
        for key in weights:
            weights.copy(key, target)
        target.attrs.update(weights.attrs)
    whole.unlink()
    return network
