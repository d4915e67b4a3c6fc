"""What the products showed: rates, shares of the possible, where a GPU begins to win, figures."""

import itertools
from dataclasses import asdict, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer import devices as places
from trainer import environment
from trainer.benchmark import matmul, reference
from trainer.benchmark.checks import check_share
from trainer.benchmark.crossover import Crossover, find_crossover
from trainer.benchmark.matmul import Case, Effort, Measured, Measurements, Shape
from trainer.benchmark.results import Result, rate_text, skipped_gpus, terminal_plot, time_text
from trainer.benchmark.timing import Timing
from trainer.environment import describe_environment

SHAPES: tuple[Shape, ...] = ("dot", "square")
_LEGEND = (
    "rate: dot products by the bytes they read, square ones by their operations; share: of the "
    "best block that was measured, those of numpy and of sums beside them included; from: the "
    "cache that holds the operands"
)
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
_STYLES = {"float32": "-", "tf32": "--", "bfloat16": "-.", "float16": ":"}


def benchmark_matmul(
    words: list[str],
    *,
    shapes: list[str],
    dtypes: list[str],
    largest: int | None = None,
    quick: bool = False,
    seed: int = 0,
) -> Result:
    """Measures matrix products of growing size.

    Args:
        words: Devices, as `trainer.devices.select_each` takes them.
        shapes: "dot", "square"; none means both.
        dtypes: "float32", "bfloat16", "float16"; none means all.
        largest: Sizes go up to here; None for what each effort has.
        quick: Measure less.
        seed: Of the operands and of the order.

    Raises:
        InputError: A word, shape or type is unknown.
        MissingError: A device is not here.
        CheckError: A figure contradicts itself, or a product is wrong or elsewhere.
    """
    kinds: Any = matmul.check_words("shape", shapes, SHAPES)
    types = matmul.check_words("dtype", dtypes, matmul.DTYPES)
    names = places.select_each(words)
    effort = matmul.QUICK if quick else matmul.FULL
    effort = replace(
        effort,
        dots=matmul.sizes_within(effort.dots, largest),
        squares=matmul.sizes_within(effort.squares, largest),
    )
    found = matmul.measure(names, kinds, types, effort, seed=seed)
    return make_result(names, kinds, types, effort, found, seed=seed)


def textbook_matmul(
    words: list[str], *, largest: int | None = None, quick: bool = False, seed: int = 0
) -> Result:
    """Shows what the textbook's program prints, and what it would print if it waited.

    Args:
        words: Devices, as `trainer.devices.select_each` takes them.
        largest: Sizes go up to here.
        quick: Fewer sizes.
        seed: Of the operands.
    """
    names = places.select_each(words)
    sizes = matmul.sizes_within((matmul.QUICK if quick else matmul.FULL).dots, largest)
    rows = matmul.textbook(names, sizes, seed=seed)
    table = [
        {
            "n": f"{row['n']:,}",
            "tensors": ", ".join(row["tensors"]),
            "warm-up": time_text(row["warm_up_seconds"]),
            "book": time_text(row["book_seconds"]),
            "awaited": time_text(row["waited_seconds"]),
            "book's GFLOP/s": f"{2 * row['n'] / row['book_seconds'] / 1e9:.3g}",
        }
        for row in rows
    ]
    return Result(
        name="textbook",
        subject=f"[1, n] x [n, 1] as the textbook times it, on {', '.join(names)}",
        rows=rows,
        table=table,
        skipped={},
        settings={"seed": seed, "devices": names, "calls": 10},
        environment=describe_environment(tuple(names), fingerprint=""),
        notes=[
            "The book stops its clock when the calls were asked for. On a GPU they are done later: "
            "its times are those of asking, the same at every size; only the awaited ones are of "
            "the product. On a CPU a call returns when it is done, and both agree.",
        ],
    )


def make_result(
    names: list[str],
    shapes: list[Shape],
    dtypes: list[str],
    effort: Effort,
    found: Measurements,
    *,
    seed: int,
) -> Result:
    """Puts what was measured into rows, curves and figures.

    Raises:
        CheckError: A share is more than all.
    """
    timings = {measured.case: measured.measurement.timing() for measured in found.cases}
    rows = [_row(measured, timings[measured.case], found) for measured in found.cases]
    crossovers = _crossovers(names, timings, seed)
    skipped = found.skipped | skipped_gpus(names)
    notes = [_told(name, crossover) for name, crossover in crossovers.items()]
    return Result(
        name="matmul",
        subject=f"matrix products on {', '.join(names)}",
        rows=rows,
        table=[_shown(row) for row in rows],
        skipped=skipped,
        settings={"seed": seed, "devices": names, "dtypes": dtypes, **asdict(effort)},
        environment=describe_environment(tuple(names), fingerprint="")
        | {"caches": environment.cpu_caches(), "threads": _threads()},
        notes=[_LEGEND, *notes],
        facts={"crossovers": {name: asdict(c) for name, c in crossovers.items()}},
        references=found.reference_facts(),
        figures={shape: _figure(shape, timings, crossovers) for shape in shapes},
        curves=_curves(rows),
        plots=[_terminal_plot(shape, timings) for shape in shapes],
    )


def _threads() -> dict[str, int]:
    import tensorflow as tf

    threads = tf.config.threading
    return {
        "inter_op": threads.get_inter_op_parallelism_threads(),  # 0: as many as there are CPUs
        "intra_op": threads.get_intra_op_parallelism_threads(),
    }


def _row(measured: Measured, timing: Timing, found: Measurements) -> dict[str, Any]:
    case = measured.case
    seconds = timing.median
    row: dict[str, Any] = {
        "key": case.key,
        "shape": case.shape,
        "n": case.n,
        "device": case.device,
        "dtype": case.dtype,
        "cold": case.cold,
        "seconds": seconds,
        "gflop_per_s": case.operations / seconds / 1e9,
        "gbyte_per_s": case.bytes / seconds / 1e9,
        "fits": _level(case),
        "to_device_seconds": measured.to_device_seconds,
        "to_host_seconds": measured.to_host_seconds,
        "error": measured.error,
        "places": measured.places,
        "timing": timing.facts(),
    }
    rate = row["gflop_per_s"] if case.shape == "square" else row["gbyte_per_s"]
    row["most"] = _most(case, rate, found)
    row["share"] = None if row["most"] is None else rate / row["most"]
    beside = found.references.get(replace(case, cold=False))
    if beside is not None and not case.cold:
        others = {name: reference.timing().median for name, reference in beside.items()}
        row["beside_seconds"] = others
        row["of_the_best_beside"] = min(v for k, v in others.items() if k != "sums") / seconds
    return row


def _level(case: Case) -> str:
    """Returns where the operands come from: the cache that holds them, or memory."""
    return "memory" if case.cold else reference.cache_of(case.bytes, case.device)


def _most(case: Case, rate: float, found: Measurements) -> float | None:
    """Returns the best block of what was measured of the thing that bounds a case.

    For squares the GFLOP/s of that device and type. For dots the GB/s of that device, whatever the
    type, at sizes that fit no smaller cache than the operands do: a cache is no slower than the
    next larger one.

    Raises:
        CheckError: The case is far beyond the references.
    """
    independent = [
        _work(other) / min(r.timing().block_seconds) / 1e9
        for other, references in found.references.items()
        if _bounds(other, case)
        for r in references.values()
    ]
    if not independent:
        return None
    check_share(rate, max(independent), case.key)
    own = [
        _work(measured.case) / min(measured.measurement.timing().block_seconds) / 1e9
        for measured in found.cases
        if _bounds(measured.case, case)
    ]
    return max(independent + own)


def _work(case: Case) -> int:
    return case.operations if case.shape == "square" else case.bytes


def _bounds(other: Case, case: Case) -> bool:
    """Says whether a case can do no more work a second than another one, or only as much."""
    if (other.shape, other.device) != (case.shape, case.device):
        return False
    if case.shape == "square":
        return other.dtype == case.dtype
    levels = [*environment.cpu_caches(), "memory"]
    own, its = _level(case), _level(other)
    return levels.index(its) >= levels.index(own)


def _series(timings: dict[Case, Timing], shape: str) -> dict[tuple[str, str], dict[int, Timing]]:
    """Returns the hot timings of a shape by (device, type) and size."""
    found: dict[tuple[str, str], dict[int, Timing]] = {}
    for case, timing in timings.items():
        if case.shape == shape and not case.cold:
            found.setdefault((case.device, case.dtype), {})[case.n] = timing
    return found


def _crossovers(names: list[str], timings: dict[Case, Timing], seed: int) -> dict[str, Crossover]:
    """Compares the first device with each other one, shape by shape and type by type."""
    found = {}
    for shape, other in itertools.product(SHAPES, names[1:]):
        series = _series(timings, shape)
        for (device, dtype), second in series.items():
            first = series.get((names[0], "float32" if dtype == "tf32" else dtype))
            if device != other or first is None:
                continue
            sizes = sorted(first.keys() & second.keys())
            found[f"{shape}/{dtype}/{names[0]}/{other}"] = find_crossover(
                sizes, [first[n] for n in sizes], [second[n] for n in sizes], seed=seed
            )
    return found


def _told(name: str, crossover: Crossover) -> str:
    shape, dtype, first, second = name.split("/")
    return f"{shape}, {dtype}: {second} against {first}: {crossover.told('n =')}"


def _size_text(n: int) -> str:
    zeros = len(str(n)) - 1
    return f"10^{zeros}" if zeros > 3 and n == 10**zeros else f"{n:,}"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    square = row["shape"] == "square"
    rate = 1e9 * (row["gflop_per_s"] if square else row["gbyte_per_s"])
    return {
        "n": f"{row['shape']} {_size_text(row['n'])}",
        "device": row["device"],
        "type": row["dtype"],
        "from": "cold" if row["cold"] else row["fits"],
        "time": time_text(row["seconds"]),
        "rate": rate_text(rate, "FLOP/s" if square else "B/s"),
        "share": "" if row["share"] is None else f"{row['share']:.1%}",
        "stable": "yes" if row["timing"]["stable"] else "no",
    }


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Returns what TensorBoard draws against n: one run for each device, so that they overlay."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if not row["cold"]:
            tags = curves.setdefault(row["device"].replace(":", ""), {})
            start = f"{row['shape']}_{row['dtype']}"
            rate = "gflop_per_s" if row["shape"] == "square" else "gbyte_per_s"
            tags.setdefault(f"{start}/microseconds", []).append((row["n"], row["seconds"] * 1e6))
            tags.setdefault(f"{start}/{rate}", []).append((row["n"], row[rate]))
    return curves


def _figure(shape: str, timings: dict[Case, Timing], crossovers: dict[str, Crossover]) -> Figure:
    """Draws time against n, as the book does, with a band from quartile to quartile."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes: Axes = figure.subplots()
    names: list[str] = []
    for (device, dtype), by_size in _series(timings, shape).items():
        names = list(dict.fromkeys([*names, device]))
        colour = _COLOURS[names.index(device) % len(_COLOURS)]
        sizes = sorted(by_size)
        medians = [by_size[n].median for n in sizes]
        low, high = zip(*(by_size[n].quartiles for n in sizes), strict=True)
        style = _STYLES[dtype]
        axes.loglog(sizes, medians, style, color=colour, marker=".", label=f"{device} {dtype}")
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    for name, crossover in crossovers.items():
        if name.startswith(f"{shape}/float32/"):
            crossover.draw(axes, name.rpartition("/")[2])
    product = "[1, n] x [n, 1]" if shape == "dot" else "[n, n] x [n, n]"
    axes.set(
        xlabel="n", ylabel="seconds", title=f"{product}: the median, from quartile to quartile"
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def _terminal_plot(shape: str, timings: dict[Case, Timing]) -> str:
    series = {
        f"{device} {dtype}": {n: timing.median for n, timing in by_size.items()}
        for (device, dtype), by_size in _series(timings, shape).items()
    }
    return terminal_plot(series, title=f"{shape}: time against n", show=time_text)
