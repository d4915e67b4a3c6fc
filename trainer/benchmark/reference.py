"""What a device can do at most, measured beside everything else: the peak and the bandwidth.

These wait for the device in another way than the measurements they are held against: they read a
value of the last result back. A clock that does not wait cannot agree with them.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from trainer import environment

# Of the largest operations that are measured, the best of these sizes is the peak.
PEAK_SIZES = (512, 1024, 2048, 4096)


def read_back(
    call: Callable[[], tf.Tensor], set_up: Callable[[], Any]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Makes a call and a way to wait for it: by reading one value of the last result.

    Operations of one device are done in the order they were asked for in.

    Args:
        call: Asks for the operation and returns its result.
        set_up: Called with each waiting, while nothing runs.

    Returns:
        What to call, and what waits.
    """
    last: list[tf.Tensor] = []

    def ask() -> None:
        last[:] = [call()]

    def wait() -> None:
        for tensor in last:
            tf.reshape(tensor, [-1])[0].numpy()
        set_up()

    return ask, wait


def cache_of(size: int, device: str) -> str:
    """Returns the smallest cache that holds so many bytes; "memory" beyond the last.

    Args:
        size: Bytes.
        device: For example "CPU:0"; the caches of a GPU are not looked up.
    """
    if device.startswith("CPU"):
        for name, capacity in environment.cpu_caches().items():
            if size <= capacity:
                return name
    return "memory"


def last_cache() -> int:
    """Returns the bytes of the CPU's last cache; 32 MiB where the system does not tell."""
    return max(environment.cpu_caches().values(), default=32 * 2**20)
