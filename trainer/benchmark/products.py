"""Matrix products of growing size, and the limits of a device that follow from them.

Two shapes: "dot" ([1, n] x [n, 1]) does two operations for eight bytes and is limited by memory;
"square" ([n, n] x [n, n]) is limited by arithmetic.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import psutil
import tensorflow as tf
from numpy.typing import NDArray

from trainer.benchmark.checks import check_device, check_product, check_random
from trainer.benchmark.devices import cpu_caches
from trainer.benchmark.timing import Budget, Measurement

_logger = logging.getLogger(__name__)

_MAX_CALL_SECONDS = 1.0  # longer products are skipped, and the skip is recorded
_EXPECTED_FLOPS_PER_SECOND = 1e9  # of a product that is larger than those measured so far
_MIN_COLD_BYTES = 2**18  # smaller operands would need too many copies to be cold
_PEAK_SIZES = (512, 1024, 2048, 4096)  # squares that have baselines

Pair = tuple[tf.Tensor, tf.Tensor]


@dataclass
class Products:
    """All products of a run."""

    entries: list[Measurement] = field(default_factory=list)  # in ascending size
    baselines: list[Measurement] = field(default_factory=list)  # the same, in other ways
    skipped: dict[str, str] = field(default_factory=dict)  # the reason for each skipped product


class Operands(NamedTuple):
    """Two random operands on a device, and the same rounded numbers as float32 on the host."""

    pair: Pair
    host: tuple[NDArray[np.float32], NDArray[np.float32]]
    copy_seconds: float


def fastest(entries: Iterable[Measurement], work: str, **wanted: Any) -> float:
    """Returns the rate of the fastest block: GFLOP/s or GB/s; 0 if no entry matches.

    Args:
        entries: What was measured.
        work: "flops" or "bytes".
        **wanted: Accepted values for columns of the row.
    """
    rates = (
        entry.row[work] / min(entry.block_seconds) / 1e9
        for entry in entries
        if all(entry.row[column] in values for column, values in wanted.items())
    )
    return max(rates, default=0.0)


def cache_levels() -> list[str]:
    """Returns the CPU's caches, the smallest first, and "memory"."""
    return [*cpu_caches(), "memory"]


def cache_level(size: int, device: str) -> str:
    """Returns the smallest CPU cache that holds `size` bytes; "memory" if there is none."""
    caches = cpu_caches().items() if device.startswith("CPU") else ()
    return next((name for name, capacity in caches if size <= capacity), "memory")


def product_row(
    shape: str, n: int, device: str, dtype: str, *, cold: bool = False
) -> dict[str, Any]:
    """Returns what a product is, and its work: 2 m n k flops, and the bytes of both operands.

    Args:
        shape: "dot" or "square".
        n: Its size.
        device: For example "GPU:0".
        dtype: "float32", "bfloat16", "float16" or "tf32" (float32 operands, TF32 arithmetic).
        cold: Whether the operands are read from memory, not from a cache.
    """
    size = (8 if dtype in ("float32", "tf32") else 4) * (n if shape == "dot" else n**2)
    what = {"shape": shape, "n": n, "device": device, "dtype": dtype, "cold": cold}
    return what | {
        "key": f"{shape}/{n}/{device}/{dtype}/{'cold' if cold else 'hot'}",
        "flops": 2 * n if shape == "dot" else 2 * n**3,
        "bytes": size,
        "fits": "memory" if cold else cache_level(size, device),
    }


def prepare_products(
    devices: list[str], shapes: list[str], dtypes: list[str], budget: Budget, *, seed: int
) -> Products:
    """Checks and warms up all products and their baselines.

    Args:
        devices: For example ["CPU:0", "GPU:0"].
        shapes: "dot", "square" or both.
        dtypes: Types of the operands. A GPU also multiplies float32 operands as TF32.
        budget: Sizes and durations.
        seed: Random seed for the operands.

    Raises:
        CheckError: A tensor is not random or on another device, or a product is wrong.
    """
    generator, products = np.random.default_rng(seed), Products()
    free_bytes = psutil.virtual_memory().available / 2
    for shape, device, dtype in itertools.product(shapes, devices, _with_tf32(dtypes)):
        if dtype == "tf32" and not device.startswith("GPU"):
            continue
        _logger.info("preparing %s products of %s on %s", shape, dtype, device)
        last: Measurement | None = None
        for n in budget.dot_sizes if shape == "dot" else budget.square_sizes:
            row = product_row(shape, n, device, dtype)
            reason = _reason_to_skip(row, last, free_bytes)
            if not reason:
                try:
                    last, used = _prepare(row, products, budget, generator)
                    free_bytes -= used
                except tf.errors.ResourceExhaustedError:
                    reason = f"not enough memory on {device}"
            if reason:
                products.skipped[row["key"]] = reason
    return products


def _with_tf32(dtypes: list[str]) -> list[str]:
    return [k for dtype in dtypes for k in ([dtype, "tf32"] if dtype == "float32" else [dtype])]


def _reason_to_skip(row: dict[str, Any], last: Measurement | None, free_bytes: float) -> str:
    if row["bytes"] * 2 > free_bytes:
        return f"{row['bytes']:,} bytes of operands do not fit in half of the memory"
    if last is not None:
        # The rate of a small product is only a lower bound for a large one.
        rate = last.row["flops"] / last.call_seconds
        seconds = row["flops"] / max(rate, _EXPECTED_FLOPS_PER_SECOND)
        if seconds > _MAX_CALL_SECONDS:
            return f"one call would take about {seconds:.0f} s"
    return ""


def _prepare(
    row: dict[str, Any], products: Products, budget: Budget, generator: np.random.Generator
) -> tuple[Measurement, int]:
    """Prepares a hot product, a cold one where it differs, and the baselines.

    Returns:
        The hot product, and the bytes that stay allocated.
    """
    operands, copies = place_operands(row, generator), 0
    hot = _measure(row, [operands.pair], operands, budget)
    products.entries.append(hot)
    dot = row["shape"] == "dot"
    if dot and row["device"].startswith("CPU") and row["bytes"] >= _MIN_COLD_BYTES:
        last_cache = max(cpu_caches().values(), default=32 * 2**20)
        copies = -(-2 * last_cache // row["bytes"]) - 1
        with tf.device(row["device"]):
            one = tf.ones([], operands.pair[0].dtype)
            pairs = [(a * one, b * one) for a, b in [operands.pair] * copies]
        cold = product_row(row["shape"], row["n"], row["device"], row["dtype"], cold=True)
        products.entries.append(_measure(cold, [operands.pair, *pairs], operands, budget))
    if dot or row["n"] in (*_PEAK_SIZES, budget.square_sizes[-1]):
        products.baselines += _baselines(row, operands, budget)
    return hot, (1 + copies) * row["bytes"]


def place_operands(row: dict[str, Any], generator: np.random.Generator) -> Operands:
    """Draws random normal operands for a product and copies them to its device."""
    n = row["n"]
    dtype = tf.as_dtype("float32" if row["dtype"] == "tf32" else row["dtype"]).as_numpy_dtype
    shapes = ((1, n), (n, 1)) if row["shape"] == "dot" else ((n, n), (n, n))
    left, right = (generator.standard_normal(s, np.float32).astype(dtype) for s in shapes)
    with tf.device(row["device"]):
        tf.test.experimental.sync_devices()
        start = time.perf_counter()
        pair = tf.identity(tf.constant(left)), tf.identity(tf.constant(right))
        tf.test.experimental.sync_devices()
        seconds = time.perf_counter() - start
    return Operands(pair, (left.astype(np.float32), right.astype(np.float32)), seconds)


def multiply_on(device: str, pairs: list[Pair]) -> Callable[[], tf.Tensor]:
    """Returns a call that multiplies the next pair of operands on a device."""
    turn = itertools.cycle(pairs)

    def multiply() -> tf.Tensor:
        a, b = next(turn)
        with tf.device(device):
            return tf.matmul(a, b)

    return multiply


def _measure(
    row: dict[str, Any], pairs: list[Pair], operands: Operands, budget: Budget
) -> Measurement:
    """Warms up a product, and checks its operands and its result."""
    multiply = multiply_on(row["device"], pairs)
    for operand in itertools.chain(*pairs):
        check_random(operand, f"{row['key']}: operand")

    def wait() -> None:
        tf.test.experimental.sync_devices()
        _set_tf32(row)

    measurement = Measurement(multiply, wait, budget, row)
    tensors = {"first operand": pairs[0][0], "second operand": pairs[0][1], "result": multiply()}
    found = {
        name: check_device(tensor, row["device"], f"{row['key']}: {name}")
        for name, tensor in tensors.items()
    }
    wait()
    start = time.perf_counter()
    product = tensors["result"].numpy()
    row["to_device_seconds"] = operands.copy_seconds
    row["to_host_seconds"] = time.perf_counter() - start
    row["error"] = check_product(*operands.host, product.astype(np.float32), row["dtype"])
    row["places"] = found
    return measurement


def _baselines(row: dict[str, Any], operands: Operands, budget: Budget) -> list[Measurement]:
    """Measures the same product with another wait, sums of the operands, and numpy."""
    (a, b), (left, right) = operands.pair, operands.host
    longer = replace(budget, block_seconds=3 * budget.block_seconds)  # reading takes time, too
    calls = {"product": _read_back(multiply_on(row["device"], [(a, b)]), row)}
    if row["shape"] == "dot":
        calls["sums"] = _read_back(lambda: (tf.reduce_sum(a), tf.reduce_sum(b))[-1], row)
    if row["dtype"] == "float32" and row["device"].startswith("CPU"):
        calls["numpy"] = (lambda: left @ right, lambda: None)
    return [
        Measurement(
            *(call, wait, longer),
            row | {"key": f"{row['key']}/{name}", "product": row["key"], "name": name},
        )
        for name, (call, wait) in calls.items()
    ]


def _read_back(
    call: Callable[[], tf.Tensor], row: dict[str, Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the call, and a wait that reads one value of its last result.

    A device executes its operations in order. A clock that does not wait cannot agree with this.
    """
    last: list[tf.Tensor] = []

    def ask() -> None:
        last[:] = [call()]

    def wait() -> None:
        for tensor in last:
            tf.reshape(tensor, [-1])[0].numpy()
        _set_tf32(row)

    return ask, wait


def _set_tf32(row: dict[str, Any]) -> None:
    """Selects TF32 or float32 arithmetic. No product may run meanwhile."""
    tf.config.experimental.enable_tensor_float_32_execution(row["dtype"] == "tf32")
