"""What must hold for a figure to be believed; where it does not, the harness refuses it."""

import math

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer.errors import CheckError

# Unit roundoff: half the distance from 1 to the next number.
_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_AT_A_TIME = 2**20
_NOISE = 1.25


def check_device(tensor: tf.Tensor, device: str, what: str) -> str:
    """Returns where a tensor lives.

    Args:
        tensor: Eager.
        device: Where it was asked to be, for example "GPU:0".
        what: Of the tensor, for the message.

    Raises:
        CheckError: It lives elsewhere.
    """
    found = str(tensor.device).rpartition("/device:")[2]
    if found != device:
        raise CheckError(f"{what}: expected on {device}, found on {found or 'no device'}")
    return found


def check_random(tensor: tf.Tensor, what: str) -> None:
    """Refuses inputs that are not random normal: zeros and ones can be multiplied faster.

    Args:
        tensor: Of any float type.
        what: Of the tensor, for the message.

    Raises:
        CheckError: Its mean is not near 0 or its standard deviation not near 1, by more than
            random numbers explain (six standard errors).
    """
    values = tf.cast(tf.reshape(tensor, [-1])[:1_000_000], tf.float32).numpy()
    if len(values) < 2:
        return  # one number says nothing of where it was drawn
    mean, deviation = float(values.mean()), float(values.std())
    error = 6 / math.sqrt(len(values))
    if abs(mean) > error or not 1 - error < deviation < 1 + error or not values.any():
        raise CheckError(
            f"{what}: expected random normal numbers (mean 0, standard deviation 1), received "
            f"mean {mean:.3g}, standard deviation {deviation:.3g}"
        )


def check_product(
    a: NDArray[np.float32], b: NDArray[np.float32], product: NDArray[np.float32], dtype: str
) -> float:
    """Compares a matrix product with the float64 product of the same operands, on some rows.

    The bound is that of a float32 sum, 4 sqrt(n) u |a||b| (probabilistic: Higham and Mary 2019,
    SIAM J. Sci. Comput. 41(5), theorem 2.4), and one rounding of the result to its type.

    Args:
        a: float32 [m, n], as rounded to the type.
        b: float32 [n, k], likewise.
        product: float32 [m, k].
        dtype: "float32", "tf32", "bfloat16" or "float16".

    Returns:
        The largest error, relative to |a||b|.

    Raises:
        CheckError: An entry is further off than that.
    """
    rows = np.linspace(0, len(a) - 1, min(len(a), 8)).astype(int)
    expected = size = np.zeros((len(rows), b.shape[1]))
    for first in range(0, a.shape[1], _AT_A_TIME):  # float64 of all of them may not fit
        part = slice(first, first + _AT_A_TIME)
        left, right = a[rows, part].astype(np.float64), b[part].astype(np.float64)
        expected, size = expected + left @ right, size + abs(left) @ abs(right)
    error = abs(product[rows].astype(np.float64) - expected)
    roundoff = _ROUNDOFF["float32" if dtype == "tf32" else dtype]
    inputs = 2 * _ROUNDOFF["tf32"] if dtype == "tf32" else 0.0
    sums = 4 * math.sqrt(a.shape[1]) * _ROUNDOFF["float32"]
    allowed = 2 * roundoff * abs(expected) + (sums + inputs) * size
    if not (error <= allowed).all():
        worst = float((error / size).max())
        raise CheckError(
            f"the {dtype} product of {list(a.shape)} and {list(b.shape)} is wrong: off by "
            f"{worst:.3g} of the sizes that were summed"
        )
    return float((error / size).max())


def check_share(rate: float, most: float, what: str) -> None:
    """Refuses a rate beyond what was measured to be possible, awaited in another way.

    Two honest measurements of the same thing differ by what else the machine does meanwhile: a
    quarter is allowed for that. A clock that does not wait is off by factors.

    Args:
        rate: In any unit.
        most: The best block of the references, in the same unit.
        what: Was measured, for the message.

    Raises:
        CheckError: It is more than a quarter beyond.
    """
    if not rate <= _NOISE * most:
        raise CheckError(
            f"{what}: {rate / most:.0%} of the most that was measured in the same run: one of the "
            "two was not timed as it ran"
        )
