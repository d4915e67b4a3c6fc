"""Uses of undocumented names of TensorFlow in tuning."""

import contextlib
from collections.abc import Iterator

# No public function returns the gradients that tf.custom_gradient has registered.
from tensorflow.python.framework import ops


@contextlib.contextmanager
def released_gradients() -> Iterator[None]:
    """Releases the functions that tf.custom_gradient registers in this context.

    TensorFlow never releases them. Each function holds a graph and the captured tensors. In tuning,
    these include all images, once per trial.
    """
    registered = ops.gradient_registry._registry
    before = set(registered)
    try:
        yield
    finally:
        for name in registered.keys() - before:
            if name.startswith("CustomGradient"):
                del registered[name]
