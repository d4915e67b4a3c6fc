"""Accelerated calculation: the same matrix product at growing size on every device.

    python scripts/introduction_1_calculation.py

First of three; `trainer benchmark matmul` measures the same with everything that belongs to it.
"""

import numpy as np
import tensorflow as tf

from trainer.benchmark.cases import select_each
from trainer.benchmark.result import time_text
from trainer.benchmark.timing import Measurement

SIZES = (10, 100, 1_000)


def time_product(device: str, n: int) -> tuple[float, float]:
    """Returns the seconds of one n x n product, and the GFLOP/s that this is."""
    numbers = np.random.default_rng(0).standard_normal((2, n, n), dtype=np.float32)
    with tf.device(device):
        # tf.identity moves them to the device now: copying is no part of the product.
        a, b = (tf.identity(tf.constant(array)) for array in numbers)

        # A GPU answers a call at once and calculates later: without waiting for it, what is
        # measured is how fast one can ask.
        measurement = Measurement(lambda: tf.matmul(a, b), tf.test.experimental.sync_devices)
        for _ in range(9):
            measurement.run_block()
    seconds = measurement.median
    return seconds, 2 * n**3 / seconds / 1e9  # n additions and n products for each of n^2 numbers


def main() -> None:
    """Prints a line for each size, with a column for each device."""
    devices = select_each([])  # the CPU and every GPU
    print(f"{'n':>6}  " + "  ".join(f"{device:>22}" for device in devices))
    for n in SIZES:
        columns = []
        for device in devices:
            seconds, rate = time_product(device, n)
            columns.append(f"{time_text(seconds):>8} {rate:>6.3g} GFLOP/s")
        print(f"{n:>6}  " + "  ".join(columns))
    if len(devices) == 1:
        print("There is no GPU here, so there is no column for one.")


if __name__ == "__main__":
    main()
