"""Uses of undocumented names of TensorFlow; `kernel_internals` and some tools have more.

An upgrade of TensorFlow can change such a name. Each name is used only in these modules, with the
reason. After an upgrade, tests/test_tensorflow_internals.py fails for each use that is broken.
"""

from typing import Any

import tensorflow as tf


def profiler_step(step: int) -> Any:
    """Returns a context that marks a step in a profiler trace; only `_r=1` steps are counted."""
    return tf.profiler.experimental.Trace("train", step_num=step, _r=1)
