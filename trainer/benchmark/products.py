"""Matrix products of growing size, and the limits of a device that follow from them.

Two shapes: "dot" ([1, n] x [n, 1]) does two operations for eight bytes and is limited by memory;
"square" ([n, n] x [n, n]) is limited by arithmetic.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import tensorflow as tf
from numpy.typing import NDArray

from trainer.benchmark.cases import Case, UnmeasurableError, check_device, synchronize
from trainer.benchmark.timing import Budget, Measurement
from trainer.errors import CheckError

_MAX_CALL_SECONDS = 1.0  # longer products are skipped, and the skip is recorded
_EXPECTED_FLOPS_PER_SECOND = 1e9  # of a product that is larger than those measured so far
_PEAK_SIZES = (512, 1024, 2048, 4096)  # squares that have baselines
# Unit roundoff: half the distance from 1 to the next number.
_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_CHUNK = 2**20

Pair = tuple[tf.Tensor, tf.Tensor]
HostPair = tuple[NDArray[np.float32], NDArray[np.float32]]


def product_row(shape: str, n: int, device: str, dtype: str) -> dict[str, Any]:
    """Returns what a product is, and its work: 2 m n k flops, and the bytes of both operands.

    Args:
        shape: "dot" or "square".
        n: Its size.
        device: For example "GPU:0".
        dtype: "float32", "bfloat16", "float16" or "tf32" (float32 operands, TF32 arithmetic).
    """
    return {
        # Results of earlier versions also had products with operands outside the caches ("cold").
        "key": f"{shape}/{n}/{device}/{dtype}/hot",
        "shape": shape,
        "n": n,
        "device": device,
        "dtype": dtype,
        "flops": 2 * n if shape == "dot" else 2 * n**3,
        "bytes": (8 if dtype in ("float32", "tf32") else 4) * (n if shape == "dot" else n**2),
    }


def product_cases(
    devices: list[str], shapes: list[str], dtypes: list[str], budget: Budget, *, seed: int
) -> Iterator[Case]:
    """Yields the products in ascending size. Their baselines have a "baseline" in their row.

    Args:
        devices: For example ["CPU:0", "GPU:0"].
        shapes: "dot", "square" or both.
        dtypes: Types of the operands. A GPU also multiplies float32 operands as TF32.
        budget: Sizes and durations.
        seed: Random seed for the operands.
    """
    generator = np.random.default_rng(seed)
    if "float32" in dtypes:
        dtypes = [*dtypes, "tf32"]
    for shape, device, dtype in itertools.product(shapes, devices, dtypes):
        smaller: list[Measurement] = []
        sizes = budget.dot_sizes if shape == "dot" else budget.square_sizes
        for n in sizes if dtype != "tf32" or device.startswith("GPU") else ():
            row = product_row(shape, n, device, dtype)
            prepare = functools.partial(_prepare, row, smaller, budget, generator)
            yield Case(row["key"], prepare)


def baselines_of(measured: Iterable[Measurement]) -> list[Measurement]:
    """Returns the measurements that are baselines."""
    return [each for each in measured if "baseline" in each.row]


def peak_flops(measured: Iterable[Measurement], device: str, dtype: str | None = None) -> float:
    """Returns the GFLOP/s of the fastest block of a device, without dot products; 0 without any.

    Args:
        measured: Products and operations.
        device: For example "GPU:0".
        dtype: None means any type.
    """
    return max(
        (
            each.row["flops"] / min(each.block_seconds) / 1e9
            for each in measured
            if each.row["device"] == device
            and each.row.get("shape") != "dot"
            and dtype in (None, each.row.get("dtype"))
        ),
        default=0.0,
    )


def peak_bandwidth(measured: Iterable[Measurement], device: str, size: int) -> float:
    """Returns the GB/s of the fastest block that reads at least `size` bytes.

    Larger operands come from the same cache or a slower one.
    """
    return max(
        (
            each.row["bytes"] / min(each.block_seconds) / 1e9
            for each in measured
            if each.row["device"] == device
            and each.row.get("shape") != "square"
            and each.row["bytes"] >= size
        ),
        default=0.0,
    )


def _prepare(
    row: dict[str, Any], smaller: list[Measurement], budget: Budget, generator: np.random.Generator
) -> list[Measurement]:
    """Warms up a product and its baselines, and checks its operands and its result.

    Raises:
        UnmeasurableError: It is too large.
        CheckError: A tensor is not random or on another device, or the product is wrong.
    """
    # The operands are on the device and on the host. Half of the memory stays free.
    if 4 * row["bytes"] > psutil.virtual_memory().available:
        raise UnmeasurableError(
            f"{row['bytes']:,} bytes of operands do not fit in half of the memory"
        )
    if smaller:
        # The rate of a small product is only a lower bound for a large one.
        rate = smaller[-1].row["flops"] / smaller[-1].call_seconds
        seconds = row["flops"] / max(rate, _EXPECTED_FLOPS_PER_SECOND)
        if seconds > _MAX_CALL_SECONDS:
            raise UnmeasurableError(f"one call would take about {seconds:.0f} s")
    pair, host, row["to_device_seconds"] = place_operands(row, generator)
    for operand in pair:
        check_random(operand, f"{row['key']}: operand")
    multiply = multiply_on(row["device"], pair)
    wait = functools.partial(synchronize, tf32=row["dtype"] == "tf32")
    measurement = Measurement(multiply, wait, budget, row)
    tensors = {"first operand": pair[0], "second operand": pair[1], "result": multiply()}
    row["places"] = {
        name: check_device(tensor, row["device"], f"{row['key']}: {name}")
        for name, tensor in tensors.items()
    }
    wait()
    start = time.perf_counter()
    product = tensors["result"].numpy()
    row["to_host_seconds"] = time.perf_counter() - start
    row["error"] = check_product(*host, product.astype(np.float32), row["dtype"])
    smaller.append(measurement)
    if row["shape"] == "dot" or row["n"] in (*_PEAK_SIZES, budget.square_sizes[-1]):
        return [measurement, *_baselines(row, multiply, host, budget)]
    return [measurement]


def place_operands(
    row: dict[str, Any], generator: np.random.Generator
) -> tuple[Pair, HostPair, float]:
    """Draws random normal operands for a product and copies them to its device.

    Returns:
        The operands on the device, the same rounded numbers as float32 on the host, and the
        seconds of the copy.
    """
    n = row["n"]
    dtype = tf.as_dtype("float32" if row["dtype"] == "tf32" else row["dtype"]).as_numpy_dtype
    shapes = ((1, n), (n, 1)) if row["shape"] == "dot" else ((n, n), (n, n))
    left, right = (generator.standard_normal(s, np.float32).astype(dtype) for s in shapes)
    with tf.device(row["device"]):
        synchronize()
        start = time.perf_counter()
        pair = tf.identity(tf.constant(left)), tf.identity(tf.constant(right))
        synchronize()
        seconds = time.perf_counter() - start
    return pair, (left.astype(np.float32), right.astype(np.float32)), seconds


def multiply_on(device: str, pair: Pair) -> Callable[[], tf.Tensor]:
    """Returns a call that multiplies two operands on a device."""

    def multiply() -> tf.Tensor:
        with tf.device(device):
            return tf.matmul(*pair)

    return multiply


def _baselines(
    row: dict[str, Any], multiply: Callable[[], tf.Tensor], host: HostPair, budget: Budget
) -> list[Measurement]:
    """Measures the same product with another wait, and in numpy."""
    last: list[tf.Tensor] = []

    def ask() -> None:
        last[:] = [multiply()]

    def read_back() -> None:
        """Reads one value of the last result.

        A device executes its operations in order. A clock that does not wait cannot agree.
        """
        for tensor in last:
            tf.reshape(tensor, [-1])[0].numpy()
        tf.config.experimental.enable_tensor_float_32_execution(row["dtype"] == "tf32")

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {"product": (ask, read_back)}
    if row["dtype"] == "float32" and row["device"].startswith("CPU"):
        calls["numpy"] = (lambda: host[0] @ host[1], lambda: None)
    longer = replace(budget, block_seconds=3 * budget.block_seconds)  # reading takes time, too
    return [
        Measurement(*each, longer, row | {"key": f"{row['key']}/{name}", "baseline": name})
        for name, each in calls.items()
    ]


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
