"""`trainer benchmark matmul`: the textbook's demonstration, with a clock that waits."""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.benchmark.cases import baselines_of, check_share, measure, synchronize
from trainer.benchmark.curves import crossover_notes, draw_curves, find_crossovers
from trainer.benchmark.devices import select_each
from trainer.benchmark.products import (
    fastest,
    multiply_on,
    place_operands,
    product_cases,
    product_row,
)
from trainer.benchmark.result import BenchmarkResult, Columns, spread_text, time_text
from trainer.benchmark.timing import Budget, Measurement

FULL = Budget(15, 0.03, 0.5, tuple(2**k for k in range(13)), tuple(10**k for k in range(9)))
QUICK = Budget(7, 0.004, 0.05, tuple(4**k for k in range(6)), (1, 100, 10**4, 10**6, 10**7))
_COLUMNS: Columns = {
    "shape": ("shape", ""),
    "n": ("n", ","),
    "device": ("device", ""),
    "type": ("dtype", ""),
    "time": ("seconds", time_text),
    "IQR": ("timing", spread_text),
    "GFLOP/s": ("gflop_per_s", ".3g"),
    "GB/s": ("gbyte_per_s", ".3g"),
    "share": ("share", ".1%"),
}
_TEXTBOOK_COLUMNS: Columns = {
    "n": ("n", ","),
    "device": ("device", ""),
    "tensors": ("tensors", ", ".join),
    "warm-up": ("warm_up_seconds", time_text),
    "book": ("book_seconds", time_text),
    "awaited": ("waited_seconds", time_text),
    "book's GFLOP/s": ("book_gflop_per_s", ".3g"),
}
_TEXTBOOK_NOTE = (
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

    The arguments are the options of `trainer benchmark matmul`; `words` are those of `--device`.

    Raises:
        InputError: A device is unknown.
        MissingError: A device is not available.
        CheckError: A rate is impossible, a product is wrong, or a tensor is on another device.
    """
    names = select_each(words)
    budget = _budget(largest, quick=quick)
    cases = product_cases(names, shapes, dtypes, budget, seed=seed)
    measured, skipped = measure(cases, budget, seed=seed)
    baselines = baselines_of(measured)
    rows = [_complete(each, measured) for each in measured if each not in baselines]
    crossovers = find_crossovers(rows, "n", first=names[0])
    return BenchmarkResult(
        name="matmul",
        subject=f"matrix products on {', '.join(names)}",
        rows=rows,
        columns=_COLUMNS,
        notes=crossover_notes(crossovers),
        skipped=skipped,
        settings={"seed": seed, "dtypes": dtypes, **asdict(budget)},
        devices=names,
        facts={"crossovers": crossovers},
        baselines=baselines,
        figure=_figure(rows, shapes, crossovers),
        size="n",
        scalars=_scalars,
    )


def textbook_matmul(
    words: list[str], *, largest: int | None = None, quick: bool = False, seed: int = 0
) -> BenchmarkResult:
    """Times the dot product as the textbook does, and again with a clock that waits.

    The book makes ten calls to warm up, and reports the mean of ten more calls. The arguments are
    those of `benchmark_matmul`.
    """
    names, generator, rows = select_each(words), np.random.default_rng(seed), []
    for device, n in itertools.product(names, _budget(largest, quick=quick).dot_sizes):
        row = product_row("dot", n, device, "float32")
        pair, _, _ = place_operands(row, generator)
        multiply = multiply_on(device, pair)
        tensors = [str(t.device).rpartition("device:")[2] for t in (*pair, multiply())]
        warm_up, book = (_seconds_of_ten(multiply, wait=False) for _ in range(2))
        waited = _seconds_of_ten(multiply, wait=True)
        row |= {"tensors": tensors, "warm_up_seconds": warm_up, "book_seconds": book}
        rows.append(row | {"waited_seconds": waited, "book_gflop_per_s": 2 * n / book / 1e9})
    return BenchmarkResult(
        name="textbook",
        subject=f"[1, n] x [n, 1] as the textbook times it, on {', '.join(names)}",
        rows=rows,
        columns=_TEXTBOOK_COLUMNS,
        notes=[_TEXTBOOK_NOTE],
        settings={"seed": seed, "calls": 10},
        devices=names,
    )


def _seconds_of_ten(call: Callable[[], Any], *, wait: bool) -> float:
    """Returns the mean seconds of ten calls."""
    synchronize()
    start = time.perf_counter()
    for _ in range(10):
        call()
    if wait:
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


def _complete(each: Measurement, measured: list[Measurement]) -> dict[str, Any]:
    """Adds timing, rates and the share of the limit to the row of a product.

    The limit of a square is the GFLOP/s of its device and type. That of a dot product is the GB/s
    of its device for operands that are at least as large.

    Raises:
        CheckError: The rate is far above the baselines.
    """
    row, baselines = each.complete_row(), baselines_of(measured)
    if row["shape"] == "square":
        work, rate, least = "flops", row["gflop_per_s"], 0
        same = {key: row[key] for key in ("shape", "device", "dtype")}
    else:
        work, rate, least = "bytes", row["gbyte_per_s"], row["bytes"]
        same = {key: row[key] for key in ("shape", "device")}
    row["label"], row["most"], row["share"] = f"{row['shape']}/{row['dtype']}", None, None
    if limit := fastest(baselines, work, at_least=least, **same):
        check_share(rate, limit, row["key"])
        row["most"] = fastest(measured, work, at_least=least, **same)
        row["share"] = rate / row["most"]
    return row


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    tag = f"{row['shape']}_{row['dtype']}"
    rate = "gflop_per_s" if row["shape"] == "square" else "gbyte_per_s"
    return {f"{tag}/microseconds": row["seconds"] * 1e6, f"{tag}/{rate}": row[rate]}


def _figure(rows: list[dict[str, Any]], shapes: list[str], crossovers: dict[str, Any]) -> Figure:
    """Draws time against n, one panel for each shape."""
    figure = Figure(figsize=(8 * len(shapes), 5.5), layout="constrained")
    titles = {"dot": "[1, n] x [n, 1]", "square": "[n, n] x [n, n]"}
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        shown = {k: v for k, v in crossovers.items() if k.startswith(f"{shape}/float32/")}
        draw_curves(axes, [row for row in rows if row["shape"] == shape], "n", shown)
        axes.set_title(titles[shape])
    return figure
