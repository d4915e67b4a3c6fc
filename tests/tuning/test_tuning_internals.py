"""Each name of TensorFlow that is not documented still works as `tuning` uses it."""

import gc
import weakref
from typing import Any

import tensorflow as tf

from trainer.tuning.tensorflow_internals import released_gradients


def test_registered_gradients_are_released() -> None:
    @tf.custom_gradient
    def square(x: tf.Tensor) -> Any:
        return x * x, lambda upstream: 2 * x * upstream

    image = tf.ones((3,))
    released: list[Any] = []
    with released_gradients():
        graph = tf.function(lambda: square(image)).get_concrete_function().graph
        released.append(weakref.ref(graph))
    del graph
    gc.collect()
    assert released[0]() is None
