"""Each name of Keras that is not documented still works as this project uses it."""

import importlib.util

import keras
import pytest

from trainer import keras_internals


@pytest.mark.parametrize("name", keras_internals.DEFERRED_MODULES)
def test_keras_has_the_deferred_modules(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


def test_the_attributes_that_keras_stores_in_callbacks() -> None:
    callback = keras.callbacks.Callback()
    callback.set_model(keras.Sequential())
    callback.set_params({"epochs": 1})
    referring = {name for name, value in vars(callback).items() if value is not None}
    assert referring >= {*keras_internals.CALLBACK_ATTRIBUTES}
    for name in keras_internals.CALLBACK_ATTRIBUTES:
        assert getattr(callback, name) in (callback.model, callback.params)
