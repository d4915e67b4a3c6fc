"""`trainer benchmark matmul`: the textbook's demonstration, with a clock that waits."""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from trainer.benchmark.checks import check_share
from trainer.benchmark.curves import Curves
from trainer.benchmark.devices import cpu_caches, select_each
from trainer.benchmark.products import (
    Products,
    cache_levels,
    fastest,
    multiply_on,
    place_operands,
    prepare_products,
    product_row,
)
from trainer.benchmark.result import BenchmarkResult, skipped_gpus, time_text, with_unit
from trainer.benchmark.timing import Budget, Measurement, run_interleaved
from trainer.environment import describe_environment

FULL = Budget(15, 0.03, 0.5, tuple(2**k for k in range(13)), tuple(10**k for k in range(9)))
QUICK = Budget(7, 0.004, 0.05, tuple(4**k for k in range(6)), (1, 100, 10**4, 10**6, 10**7))
_BOOK = (
    "book: the clock stops after the last call; awaited: after the device has finished. A GPU "
    "executes calls later, so the book's time is only that of the calls, the same at every size. "
    "A CPU finishes before the call returns: both times agree."
)


def benchmark_matmul(
    words: list[str],
    *,
    shapes: list[str],
    dtypes: list[str],
    largest: int | None = None,
    quick: bool = False,
    seed: int = 0,
) -> BenchmarkResult:
    """Measures matrix products of growing size.

    Args:
        words: Devices, see `trainer.benchmark.devices.select_each`.
        shapes: "dot", "square" or both.
        dtypes: Any of "float32", "bfloat16" and "float16".
        largest: The largest size; None means that of the budget.
        quick: Measure less.
        seed: Random seed for operands and order.

    Raises:
        InputError: A device is unknown.
        MissingError: A device is not available.
        CheckError: A rate is impossible, a product is wrong, or a tensor is on another device.
    """
    names = select_each(words)
    budget = _budget(largest, quick=quick)
    products = prepare_products(names, shapes, dtypes, budget, seed=seed)
    run_interleaved([*products.entries, *products.baselines], blocks=budget.blocks, seed=seed)
    rows = [_complete(entry, products) for entry in products.entries]
    hot = [entry for entry in products.entries if not entry.row["cold"]]
    curves = Curves(
        *(hot, "n", lambda row: f"{row['shape']}/{row['dtype']}"), first=names[0], seed=seed
    )
    threads = {  # 0 means as many threads as CPUs
        "inter_op": tf.config.threading.get_inter_op_parallelism_threads(),
        "intra_op": tf.config.threading.get_intra_op_parallelism_threads(),
    }
    return BenchmarkResult(
        name="matmul",
        subject=f"matrix products on {', '.join(names)}",
        rows=rows,
        columns=_COLUMNS,
        notes=curves.notes(),
        skipped=products.skipped | skipped_gpus(names),
        settings={"seed": seed, "devices": names, "dtypes": dtypes, **asdict(budget)},
        environment=describe_environment(tuple(names), fingerprint="")
        | {
            "caches": cpu_caches(),
            "threads": threads,
        },
        facts=curves.facts(),
        baselines=products.baselines,
        figure=_figure(curves, shapes),
        size="n",
        scalars=_scalars,
    )


def textbook_matmul(
    words: list[str], *, largest: int | None = None, quick: bool = False, seed: int = 0
) -> BenchmarkResult:
    """Times the dot product as the textbook does, and again with a clock that waits.

    The book makes ten calls to warm up, and reports the mean of ten more calls.

    Args:
        words: Devices, see `trainer.benchmark.devices.select_each`.
        largest: The largest size.
        quick: Measure fewer sizes.
        seed: Random seed for the operands.
    """
    names, generator, rows = select_each(words), np.random.default_rng(seed), []
    for device, n in itertools.product(names, _budget(largest, quick=quick).dot_sizes):
        a, b = place_operands(product_row("dot", n, device, "float32"), generator).pair
        multiply = multiply_on(device, [(a, b)])
        row = {"device": device, "n": n}
        row["tensors"] = [str(t.device).rpartition("device:")[2] for t in (a, b, multiply())]
        row["warm_up_seconds"] = _seconds_of_ten(multiply, wait=False)
        row["book_seconds"] = _seconds_of_ten(multiply, wait=False)
        row["waited_seconds"] = _seconds_of_ten(multiply, wait=True)
        rows.append(row)
    return BenchmarkResult(
        name="textbook",
        subject=f"[1, n] x [n, 1] as the textbook times it, on {', '.join(names)}",
        rows=rows,
        columns={
            "n": lambda row: f"{row['n']:,}",
            "tensors": lambda row: ", ".join(row["tensors"]),
            "warm-up": lambda row: time_text(row["warm_up_seconds"]),
            "book": lambda row: time_text(row["book_seconds"]),
            "awaited": lambda row: time_text(row["waited_seconds"]),
            "book's GFLOP/s": lambda row: f"{2 * row['n'] / row['book_seconds'] / 1e9:.3g}",
        },
        notes=[_BOOK],
        settings={"seed": seed, "devices": names, "calls": 10},
        environment=describe_environment(tuple(names), fingerprint=""),
    )


def _seconds_of_ten(call: Callable[[], Any], *, wait: bool) -> float:
    """Returns the mean seconds of ten calls."""
    synchronize = tf.test.experimental.sync_devices if wait else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(10):
        call()
    synchronize()
    return (time.perf_counter() - start) / 10


def _budget(largest: int | None, *, quick: bool) -> Budget:
    """Returns the budget with sizes up to `largest`, which is measured even between two steps."""
    budget = QUICK if quick else FULL
    if largest is None:
        return budget
    sizes = (budget.square_sizes, budget.dot_sizes)
    squares, dots = (tuple(sorted({*(n for n in s if n < largest), largest})) for s in sizes)
    return replace(budget, square_sizes=squares, dot_sizes=dots)


def _complete(entry: Measurement, products: Products) -> dict[str, Any]:
    """Adds timing, rates and the share of the limit to the row of an entry.

    The limit of a square is the GFLOP/s of its device and type. That of a dot product is the GB/s
    of its device from caches that are at least as large: a cache is no slower than a larger one.

    Raises:
        CheckError: The rate is far above the baselines.
    """
    row, levels = entry.complete_row(), cache_levels()
    same = {"shape": [row["shape"]], "device": [row["device"]]}
    if row["shape"] == "square":
        work, same = "flops", same | {"dtype": [row["dtype"]]}
    else:
        work, same = "bytes", same | {"fits": levels[levels.index(row["fits"]) :]}
    rate, limit = _rate(row)[1], fastest(products.baselines, work, **same)
    row["most"] = row["share"] = None
    if limit:
        check_share(rate, limit, row["key"])
        row["most"] = max(limit, fastest(products.entries, work, **same))
        row["share"] = rate / row["most"]
    beside = {
        baseline.row["name"]: baseline.median
        for baseline in products.baselines
        if baseline.row["product"] == row["key"]
    }
    if beside:
        row["beside_seconds"] = beside
        best = min(seconds for name, seconds in beside.items() if name != "sums")
        row["of_the_best_beside"] = best / row["seconds"]
    return row


def _rate(row: dict[str, Any]) -> tuple[str, float]:
    """Returns name and value of the rate that limits a product."""
    name = "gflop_per_s" if row["shape"] == "square" else "gbyte_per_s"
    return name, row[name]


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    tag, (name, rate) = f"{row['shape']}_{row['dtype']}", _rate(row)
    hot = {f"{tag}/microseconds": row["seconds"] * 1e6, f"{tag}/{name}": rate}
    return {} if row["cold"] else hot


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "n": lambda row: f"{row['shape']} {row['n']:,}",
    "device": lambda row: str(row["device"]),
    "type": lambda row: str(row["dtype"]),
    "from": lambda row: "cold" if row["cold"] else str(row["fits"]),
    "time": lambda row: time_text(row["seconds"]),
    "rate": lambda row: with_unit(
        _rate(row)[1] * 1e9, "FLOP/s" if row["shape"] == "square" else "B/s"
    ),
    "share": lambda row: "" if row["share"] is None else f"{row['share']:.1%}",
    "stable": lambda row: "yes" if row["timing"]["stable"] else "no",
}


def _figure(curves: Curves, shapes: list[str]) -> Figure:
    """Draws time against n, one panel for each shape."""
    figure = Figure(figsize=(8 * len(shapes), 5.5), layout="constrained")
    titles = {"dot": "[1, n] x [n, 1]", "square": "[n, n] x [n, n]"}
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        curves.draw(axes, shape, mark=f"{shape}/float32/")
        axes.set_title(titles[shape])
    return figure
