"""The devices that a benchmark measures one after the other."""

import re

import tensorflow as tf

from trainer.devices import logical_devices, select
from trainer.errors import InputError


def select_each(words: list[str]) -> list[str]:
    """Returns single devices.

    "cpu:1" creates a second logical CPU device: a comparison of two devices can be tried on a
    machine without a GPU.

    Args:
        words: "cpu", "cpu:N", "gpu", "gpu:N" or "all"; none means the CPU and every GPU.

    Returns:
        TensorFlow's names, for example ["CPU:0", "GPU:0"].

    Raises:
        InputError: A word is none of these, or there is no GPU with the number N.
        MissingError: A GPU is requested, and none is usable.
    """
    for word in words:
        if not re.fullmatch(r"all|(cpu|gpu)(:\d{1,2})?", word):
            raise InputError(f"--device: expected cpu, cpu:N, gpu, gpu:N or all; received {word!r}")
    cpus = [int(word.partition(":")[2] or 0) for word in words if word.startswith("cpu")]
    if max(cpus, default=0) > 0:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(max(cpus) + 1)]
        if len(tf.config.get_logical_device_configuration(cpu) or [1]) < len(parts):
            tf.config.set_logical_device_configuration(cpu, parts)
    names: list[str] = []
    for word in words or ["all"]:
        if word == "all":
            names += ["CPU:0", *logical_devices("GPU")]
        elif word.startswith("cpu"):
            names.append(f"CPU:{word.partition(':')[2] or 0}")
        else:
            names += select(word).names
    return list(dict.fromkeys(names))
