"""Frozen layers: `model.freeze`."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import keras

from trainer.errors import InputError, did_you_mean, expect
from trainer.keras_objects import nested_layers


def freeze(model: keras.Model, patterns: Sequence[str]) -> None:
    """Freezes the layers whose path matches a pattern, and the layers in them.

    Raises:
        InputError: A pattern matches no layer, or no weight is left to train.
    """
    paths = nested_layers(model.layers)
    for pattern in patterns:
        matching = [layer for layer, path in paths.items() if fnmatchcase(path, pattern)]
        if not matching:
            names = did_you_mean(pattern, paths.values())
            raise InputError(f"model.freeze: no layer matches {pattern!r}: {names}")
        for layer in matching:
            layer.trainable = False
    expected = "a layer with weights that is not frozen"
    expect(model.trainable_variables, "model.freeze", expected, patterns)
