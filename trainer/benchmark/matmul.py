"""`trainer benchmark matmul`: matrix products of growing size; other benchmarks use the largest.

Two shapes: "dot" ([1, n] x [n, 1]) does two operations for eight bytes and is limited by memory;
"square" ([n, n] x [n, n]) is limited by arithmetic.
"""

import functools
import itertools
import time
import timeit
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import psutil
import tensorflow as tf
from numpy.typing import NDArray

from trainer import devices
from trainer.benchmark.cases import Case, complete_row, measure, select_each, synchronize
from trainer.benchmark.result import RATES, BenchmarkResult
from trainer.benchmark.timing import Budget, Measurement
from trainer.errors import CheckError, InputError

FULL = Budget(15, 0.03, 0.5, tuple(2**k for k in range(13)), tuple(10**k for k in range(9)))
QUICK = Budget(7, 0.004, 0.05, tuple(4**k for k in range(6)), (1, 100, 10**4, 10**6, 10**7))
_MAX_CALL_SECONDS = 1.0  # longer products are skipped, and the skip is recorded
_CLOCK_CHECKS = 20  # a clock is wrong if all of them fail: other programs can delay some
_LEAST_CHECKED_SECONDS = 1e-3  # reading a value takes a tenth of this
# Largest error of a product relative to |a||b|. Rounding alone causes less than half of it.
_LARGEST_ERROR = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 2e-3}


def benchmark_matmul(
    words: list[str] | None,
    *,
    products: dict[str, list[str]],
    largest: int | None = None,
    textbook: bool = False,
    quick: bool = False,
    seed: int = 0,
) -> BenchmarkResult:
    """Measures matrix products of growing size.

    The arguments are the options of `trainer benchmark matmul`; `words` are those of `--device`,
    and `products` are the types of each shape.

    Raises:
        CheckError: A rate is impossible, a product is wrong, or a tensor is on another device.
    """
    names, budget = select_each(words), QUICK if quick else FULL
    if largest is not None:
        sizes = (budget.square_sizes, budget.dot_sizes)
        squares, dots = ((*(n for n in each if n < largest), largest) for each in sizes)
        budget = replace(budget, square_sizes=squares, dot_sizes=dots)
    cases = product_cases(names, products, budget, seed=seed)
    measured, skipped = measure(cases, budget, seed=seed)
    for each in measured if textbook else ():
        timeit.timeit(each.call, number=10)  # as the book does: ten calls to warm up
        synchronize()
        start = time.perf_counter()
        # A GPU executes calls later. Without waiting for it, this is only the time of the calls.
        each.row["book_seconds"] = timeit.timeit(each.call, number=10) / 10
        synchronize()
        each.row["waited_seconds"] = (time.perf_counter() - start) / 10
    columns = ("n", "device", "dtype", "book_seconds", "waited_seconds")
    return BenchmarkResult(
        name="textbook" if textbook else "matmul",
        subject=f"matrix products on {', '.join(names)}",
        rows=[_complete(each, measured) for each in measured],
        columns=columns if textbook else ("shape", "n", "device", "dtype", *RATES),
        settings={"seed": seed, "products": products, **asdict(budget)},
        devices=names,
        x="n",
        panel="shape",
        skipped=skipped,
    )


def _complete(each: Measurement, measured: list[Measurement]) -> dict[str, Any]:
    """Returns a complete row.

    The limit of a square is the GFLOP/s of its device and type. That of a dot product is the GB/s
    of its device for operands that are at least as large.
    """
    row = each.row
    same = {"shape": row["shape"], "device": row["device"]}
    if row["shape"] == "square":
        return complete_row(each, measured, "flops", dtype=row["dtype"], **same)
    return complete_row(each, measured, "bytes", at_least=row["bytes"], **same)


def _product_row(shape: str, n: int, device: str, dtype: str) -> dict[str, Any]:
    """Returns the description of a product, its flops (2 m n k) and the bytes of both operands.

    The types are "float32", "bfloat16", "float16" and "tf32" (float32 operands, TF32 arithmetic).
    """
    return {
        "key": f"{shape}/{n}/{device}/{dtype}",
        "label": dtype,
        "shape": shape,
        "n": n,
        "device": device,
        "dtype": dtype,
        "flops": 2 * n if shape == "dot" else 2 * n**3,
        "bytes": (8 if dtype in ("float32", "tf32") else 4) * (n if shape == "dot" else n**2),
    }


def product_cases(
    names: list[str], products: dict[str, list[str]], budget: Budget, *, seed: int
) -> Iterator[Case]:
    """Yields the products in ascending size.

    `products` are the types of each shape. A GPU also multiplies float32 operands as TF32.
    """
    generator = np.random.default_rng(seed)
    for (shape, dtypes), device in itertools.product(products.items(), names):
        has_tf32 = "float32" in dtypes and device.startswith("GPU")
        for dtype in [*dtypes, "tf32"] if has_tf32 else dtypes:
            smaller: list[Measurement] = []
            for n in budget.dot_sizes if shape == "dot" else budget.square_sizes:
                row = _product_row(shape, n, device, dtype)
                yield row["key"], functools.partial(_prepare, row, smaller, budget, generator)


def _prepare(
    row: dict[str, Any], smaller: list[Measurement], budget: Budget, generator: np.random.Generator
) -> list[Measurement]:
    """Warms up a product, and checks its result and its time.

    Raises:
        InputError: It is too large.
        CheckError: A tensor is on another device, or the product or its time is wrong.
    """
    n, device, dtype = row["n"], row["device"], row["dtype"]
    # The host needs operands of the type, in float32 and in float64.
    if 8 * row["bytes"] > psutil.virtual_memory().available:
        raise InputError(f"{row['bytes']:,} bytes of operands do not fit in memory")
    if smaller:
        seconds = smaller[-1].call_seconds * row["flops"] / smaller[-1].row["flops"]
        if seconds > _MAX_CALL_SECONDS:
            raise InputError(f"one call would take about {seconds:.0f} s")
    shapes = ((1, n), (n, 1)) if row["shape"] == "dot" else ((n, n), (n, n))
    drawn = [generator.standard_normal(shape, np.float32) for shape in shapes]
    with tf.device(device):
        kind = "float32" if dtype == "tf32" else dtype
        pair = [tf.identity(tf.cast(tf.constant(array), kind)) for array in drawn]

    def multiply() -> tf.Tensor:
        with tf.device(device):
            return tf.matmul(*pair)

    wait = functools.partial(synchronize, tf32=dtype == "tf32")
    measurement = Measurement(multiply, wait, budget, row)
    _check_clock(measurement)
    tensors = [*pair, multiply()]
    for tensor in tensors:
        devices.check_placement([tensor], devices.single(device))
    a, b, product = (tensor.numpy() for tensor in tensors)
    row["error"] = _check_product(a, b, product, dtype)
    smaller.append(measurement)
    return [measurement]


def _check_clock(measured: Measurement) -> None:
    """Compares the time of a product with the time until one of its values can be read.

    A device executes its operations in order, so the last value needs all of them.

    Raises:
        CheckError: The clock does not wait for the device: it is wrong by factors.
    """
    for _ in range(_CLOCK_CHECKS):
        start = time.perf_counter()
        measured.call()
        measured.call()[0, 0].numpy()
        seconds = (time.perf_counter() - start) / 2
        if seconds <= max(_LEAST_CHECKED_SECONDS, 3 * measured.call_seconds):
            return
    raise CheckError(
        f"{measured.row['key']}: measured {measured.call_seconds:.3g} s, but its value can be read "
        f"after {seconds:.3g} s: the clock does not wait for the device"
    )


def _check_product(a: NDArray[Any], b: NDArray[Any], product: NDArray[Any], dtype: str) -> float:
    """Compares eight rows of a matrix product with the float64 product of the same operands.

    Returns:
        The largest error, relative to |a||b|.

    Raises:
        CheckError: The error is too large for the type.
    """
    rows = np.linspace(0, len(a) - 1, min(len(a), 8)).astype(int)
    left, right = a[rows].astype(np.float64), b.astype(np.float64)
    error = abs(product[rows].astype(np.float64) - left @ right)
    relative = error / (abs(left) @ np.abs(right, out=right))
    if not (relative <= _LARGEST_ERROR[dtype]).all():
        raise CheckError(
            f"the {dtype} product of {list(a.shape)} and {list(b.shape)} is wrong: its relative "
            f"error is {relative.max():.3g}"
        )
    return float(relative.max())
