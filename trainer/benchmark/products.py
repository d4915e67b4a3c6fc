"""Matrix products of growing size, and the limits of a device that follow from them.

Two shapes: "dot" ([1, n] x [n, 1]) does two operations for eight bytes and is limited by memory;
"square" ([n, n] x [n, n]) is limited by arithmetic.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
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
_LEAST_DEVIATION = 1e-3  # of random operands, even of two numbers
# Largest error of a product relative to |a||b|. Rounding alone causes less than half of it.
_LARGEST_ERROR = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 2e-3}

Pair = tuple[tf.Tensor, tf.Tensor]
HostPair = tuple[NDArray[np.float32], NDArray[np.float32]]


def product_row(shape: str, n: int, device: str, dtype: str) -> dict[str, Any]:
    """Returns the description of a product, its flops (2 m n k) and the bytes of both operands.

    The types are "float32", "bfloat16", "float16" and "tf32" (float32 operands, TF32 arithmetic).
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


def fastest(measured: list[Measurement], work: str, *, at_least: int = 0, **wanted: str) -> float:
    """Returns the GFLOP/s or GB/s of the fastest block; 0 if there is no such measurement.

    Args:
        measured: Products and operations.
        work: "flops" or "bytes".
        at_least: Only work of this size counts. Large operands come from the same cache as small
            ones or from a slower one.
        **wanted: Values of the row.
    """
    rates = (
        each.row[work] / min(each.block_seconds) / 1e9
        for each in measured
        if each.row[work] >= at_least and wanted.items() <= each.row.items()
    )
    return max(rates, default=0.0)


def _prepare(
    row: dict[str, Any], smaller: list[Measurement], budget: Budget, generator: np.random.Generator
) -> list[Measurement]:
    """Warms up a product and its baselines, and checks its operands and its result.

    Raises:
        UnmeasurableError: It is too large.
        CheckError: The operands are not random, a tensor is on another device, or the product is
            wrong.
    """
    key, device = row["key"], row["device"]
    # The host needs operands of the type, in float32 and in float64.
    if 8 * row["bytes"] > psutil.virtual_memory().available:
        raise UnmeasurableError(f"{row['bytes']:,} bytes of operands do not fit in memory")
    if smaller:
        # The rate of a small product is only a lower bound for a large one.
        rate = smaller[-1].row["flops"] / smaller[-1].call_seconds
        seconds = row["flops"] / max(rate, _EXPECTED_FLOPS_PER_SECOND)
        if seconds > _MAX_CALL_SECONDS:
            raise UnmeasurableError(f"one call would take about {seconds:.0f} s")
    pair, host, row["to_device_seconds"] = place_operands(row, generator)
    multiply, tf32 = multiply_on(device, pair), row["dtype"] == "tf32"
    measurement = Measurement(multiply, lambda: synchronize(tf32=tf32), budget, row)
    result = multiply()
    tensors = {"first operand": pair[0], "second operand": pair[1], "result": result}
    row["places"] = {n: check_device(t, device, f"{key}: {n}") for n, t in tensors.items()}
    synchronize()
    start = time.perf_counter()
    product = result.numpy()
    row["to_host_seconds"] = time.perf_counter() - start
    row["error"] = check_product(*host, product, row["dtype"])
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
    last: deque[tf.Tensor] = deque(maxlen=1)

    def read_back() -> None:
        """Reads one value of the last result. A device executes its operations in order."""
        for tensor in last:
            tensor[0, 0].numpy()
        tf.config.experimental.enable_tensor_float_32_execution(row["dtype"] == "tf32")

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "product": (lambda: last.append(multiply()), read_back)
    }
    if row["dtype"] == "float32" and row["device"].startswith("CPU"):
        calls["numpy"] = (lambda: host[0] @ host[1], lambda: None)
    longer = replace(budget, block_seconds=3 * budget.block_seconds)  # reading takes time, too
    return [
        Measurement(*each, longer, row | {"key": f"{row['key']}/{name}", "baseline": name})
        for name, each in calls.items()
    ]


def check_product(a: NDArray[Any], b: NDArray[Any], product: NDArray[Any], dtype: str) -> float:
    """Compares eight rows of a matrix product with the float64 product of the same operands.

    Args:
        a: float32 [m, n], rounded to the type.
        b: float32 [n, k], rounded to the type.
        product: [m, k].
        dtype: "float32", "tf32", "bfloat16" or "float16".

    Returns:
        The largest error, relative to |a||b|.

    Raises:
        CheckError: An operand is not random (zeros and ones can be multiplied faster), or the
            error is too large.
    """
    name = f"the {dtype} product of {list(a.shape)} and {list(b.shape)}"
    for operand in (a, b):
        if operand.size > 1 and not operand.std() > _LEAST_DEVIATION:
            raise CheckError(
                f"{name}: expected random operands, received standard deviation {operand.std():.3g}"
            )
    rows = np.linspace(0, len(a) - 1, min(len(a), 8)).astype(int)
    left, right = a[rows].astype(np.float64), b.astype(np.float64)
    error = abs(product[rows].astype(np.float64) - left @ right)
    relative = error / (np.abs(left, out=left) @ np.abs(right, out=right))
    if not (relative <= _LARGEST_ERROR[dtype]).all():
        raise CheckError(f"{name} is wrong: its relative error is {relative.max():.3g}")
    return float(relative.max())
