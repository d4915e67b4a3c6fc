"""Sanity checks that reject results which cannot be true."""

import math

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.errors import CheckError

# Unit roundoff: half the distance from 1 to the next number.
_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_CHUNK = 2**20
_NOISE = 1.25


def check_device(tensor: tf.Tensor, device: str, name: str) -> str:
    """Returns the device of an eager tensor, for example "GPU:0".

    Raises:
        CheckError: It is not `device`.
    """
    found = str(tensor.device).rpartition("/device:")[2]
    if found != device:
        raise CheckError(f"{name}: expected on {device}, found on {found or 'no device'}")
    return found


def check_random(tensor: tf.Tensor, name: str) -> None:
    """Requires random normal numbers, because zeros and ones can be multiplied faster.

    Raises:
        CheckError: Mean or standard deviation differ from 0 and 1 by more than six standard errors.
    """
    values = tf.cast(tf.reshape(tensor, [-1])[:1_000_000], tf.float32).numpy()
    mean, deviation, error = values.mean(), values.std(), 6 / math.sqrt(len(values))
    if len(values) > 1 and not (abs(mean) <= error and abs(deviation - 1) < min(error, 1)):
        raise CheckError(
            f"{name}: expected random normal numbers (mean 0, standard deviation 1), received "
            f"mean {mean:.3g}, standard deviation {deviation:.3g}"
        )


def check_product(
    a: NDArray[np.float32], b: NDArray[np.float32], product: NDArray[np.float32], dtype: str
) -> float:
    """Compares some rows of a matrix product with the float64 product of the same operands.

    The bound is that of a float32 sum, 4 sqrt(n) u |a||b| (probabilistic: Higham and Mary 2019,
    SIAM J. Sci. Comput. 41(5), theorem 2.4), plus one rounding of the result to its type.

    Args:
        a: float32 [m, n], rounded to the type.
        b: float32 [n, k], rounded to the type.
        product: float32 [m, k].
        dtype: "float32", "tf32", "bfloat16" or "float16".

    Returns:
        The largest error, relative to |a||b|.

    Raises:
        CheckError: An error exceeds the bound.
    """
    rows = np.linspace(0, len(a) - 1, min(len(a), 8)).astype(int)
    expected = size = np.zeros((len(rows), b.shape[1]))
    for first in range(0, a.shape[1], _CHUNK):  # a float64 copy of all operands may not fit
        part = slice(first, first + _CHUNK)
        left, right = a[rows, part].astype(np.float64), b[part].astype(np.float64)
        expected, size = expected + left @ right, size + abs(left) @ abs(right)
    error = abs(product[rows].astype(np.float64) - expected)
    roundoff = _ROUNDOFF["float32" if dtype == "tf32" else dtype]
    inputs = 2 * _ROUNDOFF["tf32"] if dtype == "tf32" else 0.0
    sums = 4 * math.sqrt(a.shape[1]) * _ROUNDOFF["float32"]
    worst = float((error / size).max())
    if not (error <= 2 * roundoff * abs(expected) + (sums + inputs) * size).all():
        raise CheckError(
            f"the {dtype} product of {list(a.shape)} and {list(b.shape)} is wrong: its relative "
            f"error is {worst:.3g}"
        )
    return worst


def check_share(rate: float, most: float, name: str) -> None:
    """Rejects a rate far above the best independent measurement in the same run.

    Two correct measurements of the same work differ by the noise of the machine: a quarter is
    allowed. A clock that does not wait for the device is wrong by factors.

    Raises:
        CheckError: The rate is more than a quarter above `most`, which has the same unit.
    """
    if not rate <= _NOISE * most:
        raise CheckError(
            f"{name}: {rate / most:.0%} of the best rate measured in the same run: one of the two "
            "timings is wrong"
        )
