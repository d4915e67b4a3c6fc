"""What the training steps showed: rates, where a step's time goes, where a GPU begins to win."""

from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer import devices as places
from trainer.benchmark import step
from trainer.benchmark.checks import check_share
from trainer.benchmark.crossover import Crossover, find_crossover
from trainer.benchmark.results import Result, skipped_gpus, terminal_plot, time_text
from trainer.benchmark.step import Found, Measured
from trainer.benchmark.timing import Timing
from trainer.config import Config
from trainer.environment import describe_environment

_LEGEND = (
    "step: a step of the loop, as fit runs it; GFLOP/s: of its matrix products and convolutions, "
    "and in percent of the best square product of that type; loop: what a step takes beyond that "
    "of a bare tf.function that goes through the same batches with the same network, "
    "optimizer and precision; data: choosing, gathering and augmenting the batches alone, in "
    "percent of a step"
)

_LEFT_OUT = {"other batch sizes and precisions, XLA": "by --quick, where they are not asked for"}

# By device, type and compiler: a step's time by batch size.
_Series = dict[tuple[str, str, str], dict[int, Timing]]


def benchmark_step(
    config: Config,
    words: list[str],
    *,
    batch_sizes: list[int],
    precisions: list[str],
    jit_compile: bool | None = None,
    quick: bool = False,
) -> Result:
    """Measures the training step of a configuration.

    Args:
        config: The experiment; its seed is that of the order, too.
        words: Devices, as `trainer.devices.select_each` takes them.
        batch_sizes: None means some between 32 and 2048 and the configuration's own.
        precisions: None means float32 and what "auto" chooses.
        jit_compile: With XLA or without; None means both.
        quick: Measure less; where nothing is said, as the configuration has it.

    Raises:
        InputError: A word is unknown, or the configuration does not fit its data.
        MissingError: A device is not here.
        CheckError: Outputs are elsewhere, or a rate is beyond what the device can do.
    """
    names = places.select_each(words)
    cases = step.choose_cases(config, names, batch_sizes, precisions, jit_compile, quick=quick)
    effort = step.QUICK if quick else step.FULL
    found = step.measure(config, cases, effort)
    rows = [_row(measured, found) for measured in found.cases]
    series = _series(found.cases)
    crossovers = _crossovers(names, series, config.training.seed)
    return Result(
        name="step",
        subject=f"training step of {config.model.name} ({found.parameters:,} parameters) on "
        f"{found.data.name}",
        rows=rows,
        table=[_shown(row) for row in rows],
        skipped=found.skipped | skipped_gpus(names) | (_LEFT_OUT if quick else {}),
        settings={"config": config.model_dump(mode="json"), "devices": names, **asdict(effort)},
        environment=describe_environment(tuple(names), found.data.fingerprint),
        notes=[_LEGEND, *(_told(name, crossover) for name, crossover in crossovers.items())],
        facts={"crossovers": {name: asdict(c) for name, c in crossovers.items()}},
        references=found.products.reference_facts(),
        figures={"step": _figure(rows, series, crossovers)},
        curves=_curves(rows),
        plots=[_terminal_plot(series)],
    )


def _row(measured: Measured, found: Found) -> dict[str, Any]:
    case, timings = measured.case, measured.timings()
    seconds = {name: timing.median for name, timing in timings.items()}
    peak = found.products.peak(case.device, case.peak_dtype)
    rate = None if measured.flops is None else measured.flops / seconds["loop"] / 1e9
    if rate is not None:
        check_share(rate, peak, case.key)
    beyond = timings["loop"].relative_to(timings["bare"])
    return {
        "key": case.key,
        **asdict(case),
        "step_ms": seconds["loop"] * 1e3,
        "bare_ms": seconds["bare"] * 1e3,
        "batches_ms": seconds["batches"] * 1e3,
        "images_per_second": case.batch_size / seconds["loop"],
        "flops": measured.flops,
        "gflop_per_s": rate,
        "peak_gflop_per_s": peak,
        "share": None if rate is None else rate / peak,
        "overhead": beyond.median - 1,
        "overhead_interval": [share - 1 for share in beyond.interval],
        "batches_share": seconds["batches"] / seconds["loop"],
        "steps_per_execution": measured.steps,
        "timing": timings["loop"].facts(),
        "bare_timing": timings["bare"].facts(),
        "batches_timing": timings["batches"].facts(),
    }


def _series(cases: list[Measured]) -> _Series:
    found: _Series = {}
    for measured in cases:
        case = measured.case
        by_size = found.setdefault((case.device, case.precision, case.compiler), {})
        by_size[case.batch_size] = measured.timings()["loop"]
    return found


def _crossovers(names: list[str], series: _Series, seed: int) -> dict[str, Crossover]:
    """Compares the first device with each other one, by precision and compiler."""
    found = {}
    for (device, precision, compiler), second in series.items():
        first = series.get((names[0], precision, compiler))
        if device == names[0] or first is None:
            continue
        sizes = sorted(first.keys() & second.keys())
        if sizes:
            found[f"{precision}/{compiler}/{names[0]}/{device}"] = find_crossover(
                sizes, [first[n] for n in sizes], [second[n] for n in sizes], seed=seed
            )
    return found


def _told(name: str, crossover: Crossover) -> str:
    precision, compiler, first, second = name.split("/")
    return f"{precision}, {compiler}: {second} against {first}: {crossover.told('batch size')}"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    rate, share = row["gflop_per_s"], row["share"]
    xla = " XLA" if row["jit_compile"] else ""
    return {
        "batch": f"{row['batch_size']:,}",
        "device": row["device"],
        "precision": row["precision"].removeprefix("mixed_") + xla,
        "step": time_text(row["step_ms"] / 1e3),
        "images/s": f"{row['images_per_second']:,.0f}",
        "GFLOP/s": "" if rate is None else f"{rate:.3g}, {share:.0%}",
        "loop": f"{row['overhead']:+.0%}",
        "data": f"{row['batches_share']:.1%}",
        "stable": "yes" if row["timing"]["stable"] else "no",
    }


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Returns what TensorBoard draws against the batch size: one run for each device."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        tags = curves.setdefault(row["device"].replace(":", ""), {})
        start = f"step_{row['precision']}{'_xla' if row['jit_compile'] else ''}"
        for name in ("step_ms", "images_per_second"):
            tags.setdefault(f"{start}/{name}", []).append((row["batch_size"], row[name]))
    return curves


def _figure(
    rows: list[dict[str, Any]], series: _Series, crossovers: dict[str, Crossover]
) -> Figure:
    """Draws a step's time against the batch size, and the parts it is made of."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_times(left, series, crossovers)
    _draw_parts(right, rows)
    return figure


def _draw_times(axes: Axes, series: _Series, crossovers: dict[str, Crossover]) -> None:
    for number, ((device, precision, compiler), by_size) in enumerate(series.items()):
        sizes = sorted(by_size)
        low, high = zip(*(by_size[n].quartiles for n in sizes), strict=True)
        label = f"{device} {precision.removeprefix('mixed_')} {compiler}"
        style, colour = "--" if compiler == "xla" else "-", f"C{number}"
        medians = [by_size[n].median for n in sizes]
        axes.loglog(sizes, medians, style, color=colour, marker=".", label=label)
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    for name, crossover in crossovers.items():
        crossover.draw(axes, name.rpartition("/")[2])
    axes.set(
        xlabel="batch size",
        ylabel="seconds a step",
        title="step: the median, from quartile to quartile",
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=9)


def _draw_parts(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draws bars of microseconds an image: training, batches, and what else the loop does."""
    names = [
        f"{row['device']} {row['precision'].removeprefix('mixed_')}"
        f"{' xla' if row['jit_compile'] else ''} {row['batch_size']}"
        for row in rows
    ]
    per_image = [1e3 / row["batch_size"] for row in rows]
    parts = {
        "a bare epoch, without its batches": [max(0, r["bare_ms"] - r["batches_ms"]) for r in rows],
        "batches": [row["batches_ms"] for row in rows],
        "rest of the loop": [max(0, row["step_ms"] - row["bare_ms"]) for row in rows],
    }
    left = np.zeros(len(rows))
    for name, milliseconds in parts.items():
        width = np.multiply(milliseconds, per_image)
        axes.barh(names, width, left=left, label=name)
        left += width
    axes.invert_yaxis()
    axes.margins(x=0.25)  # where the legend finds room
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="microseconds an image", title="where a step's time goes")
    axes.legend(fontsize=9)


def _terminal_plot(series: _Series) -> str:
    shown = {
        f"{device} {precision} {compiler}": {n: timing.median for n, timing in by_size.items()}
        for (device, precision, compiler), by_size in series.items()
    }
    return terminal_plot(shown, title="time of a step against batch size", show=time_text)
