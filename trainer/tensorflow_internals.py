"""Uses of undocumented names of TensorFlow; `kernel_internals` has those of the kernel check.

An upgrade of TensorFlow can change such a name. Each name is used only in these modules, with the
reason. After an upgrade, tests/test_tensorflow_internals.py fails for each use that is broken.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# No public function returns the definition of an operation, or the gradients that
# tf.custom_gradient has registered.
from tensorflow.python.framework import op_def_registry, ops


def profiler_step(step: int) -> Any:
    """Returns a context that marks a step in a profiler trace; only `_r=1` steps are counted."""
    return tf.profiler.experimental.Trace("train", step_num=step, _r=1)


def operation_definition(name: str) -> Any:
    """Returns TensorFlow's OpDef of an operation; None if there is no such operation."""
    return op_def_registry.get(name)


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
