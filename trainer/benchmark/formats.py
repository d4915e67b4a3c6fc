"""`trainer benchmark formats`: size, loading time, speed and accuracy of each export format."""

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer import data as datasets
from trainer.benchmark.result import BenchmarkResult
from trainer.benchmark.timing import Timing
from trainer.environment import describe_environment
from trainer.errors import CheckError, InputError, MissingError
from trainer.run import open_run
from trainer.saving.export import export
from trainer.saving.formats import FORMATS
from trainer.saving.versions import Verification, artefact_files

_logger = logging.getLogger(__name__)

BATCH = 256
QUICK = {"processes": 2, "calls": 200}  # calls: at batch 1, in each process
FULL = {"processes": 5, "calls": 1000}


def benchmark_formats(
    reference: str = "latest", *, runs_directory: str = "runs", quick: bool = False, seed: int = 0
) -> BenchmarkResult:
    """Exports a run to every available format and measures each on this machine.

    Each format is loaded several times, each time in a new process without any other runtime, in
    random order.

    Args:
        reference: A run directory, its name, or "latest".
        runs_directory: Folder of the run directories.
        quick: Measure less.
        seed: Random seed for the order.

    Raises:
        InputError: There is no such run.
        CheckError: The process of a format fails.
    """
    run, budget = open_run(reference, runs_directory=runs_directory), QUICK if quick else FULL
    config = run.config()
    data = datasets.load(config.data)
    images = data.test.read(slice(BATCH))[0]
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        # A small test set is repeated.
        np.save(Path(folder) / "images.npy", np.resize(images, (BATCH, *images.shape[1:])))
        artefacts = _export_all(str(run.path), folder, skipped)
        turns = [kind for kind in artefacts for _ in range(budget["processes"])]
        random.Random(seed).shuffle(turns)
        measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in artefacts}
        for number, kind in enumerate(turns, 1):
            _logger.info("process %d of %d: %s", number, len(turns), kind)
            measured[kind].append(_measure(kind, artefacts[kind][0], folder, budget["calls"]))
        rows = [
            _row(kind, path, measured[kind], verified)
            for kind, (path, verified) in artefacts.items()
        ]
    return BenchmarkResult(
        name="formats",
        subject=f"{run.name}: {data.spec.name}, {config.model.name}",
        rows=rows,
        columns=_COLUMNS,
        skipped=skipped,
        settings={"batch": BATCH, "seed": seed, **budget},
        environment=describe_environment(("CPU:0",), data.spec.fingerprint),
        figure=_figure(rows),
        transposed=True,
    )


def _export_all(
    run: str, folder: str, skipped: dict[str, str]
) -> dict[str, tuple[Path, Verification]]:
    """Exports to every format; adds a format whose packages are missing to `skipped`."""
    artefacts = {}
    for kind, format_ in FORMATS.items():
        _logger.info("exporting %s", kind)
        try:
            version, exported = export(run, kind, name="model", directory=folder)
        except (MissingError, CheckError, InputError) as error:
            skipped[kind] = str(error)
            _logger.info("%s is skipped: %s", kind, error)
        else:
            artefacts[kind] = version / format_.file, exported.verified
    return artefacts


def _measure(kind: str, artefact: Path, folder: str, calls: int) -> dict[str, Any]:
    """Measures a format once, in a new process that has the module path of this one."""
    program = [sys.executable, "-P", "-m", "trainer.benchmark.format_process"]
    done = subprocess.run(
        [*program, kind, str(artefact.absolute()), f"{folder}/images.npy", str(calls)],
        env=os.environ
        | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise CheckError(f"{kind} cannot be measured: {last[0]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _row(
    kind: str, artefact: Path, measured: list[dict[str, Any]], verified: Verification
) -> dict[str, Any]:
    one, many = (_join([Timing(**m[key]) for m in measured]) for key in ("one", "many"))
    return {
        "key": kind,
        "format": kind,
        "bytes": sum(file.stat().st_size for file in artefact_files(artefact)),
        "import_seconds": float(np.median([m["import_seconds"] for m in measured])),
        "load_seconds": float(np.median([m["load_seconds"] for m in measured])),
        "first_call_seconds": one.first_seconds,
        "latency_p50_ms": 1000 * one.median,
        "latency_p95_ms": 1000 * one.percentile(95),
        "images_per_second": BATCH / many.median,
        "accuracy": verified.accuracy,
        "model_accuracy": verified.model_accuracy,
        "largest_difference": verified.largest_difference,
        "timing": one.to_json(),
        "batches": many.to_json(),
        "loads_seconds": [m["load_seconds"] for m in measured],
    }


def _join(timings: list[Timing]) -> Timing:
    """Returns the timings of the same call in several processes as one timing."""
    return Timing(
        [seconds for timing in timings for seconds in timing.block_seconds],
        float(np.median([timing.first_seconds for timing in timings])),
        max(timing.calls_per_block for timing in timings),
        sum(timing.warmup_blocks for timing in timings),
        all(timing.settled for timing in timings),
    )


def _quartiles(row: dict[str, Any]) -> str:
    low, high = (BATCH / seconds for seconds in reversed(row["batches"]["quartiles_seconds"]))
    return f"{low / 1000:.1f}k-{high / 1000:.1f}k"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: str(row["format"]),
    "bytes": lambda row: f"{row['bytes']:,}",
    "import, s": lambda row: f"{row['import_seconds']:.2f}",
    "load, ms": lambda row: f"{1000 * row['load_seconds']:.1f}",
    "first call, ms": lambda row: f"{1000 * row['first_call_seconds']:.1f}",
    "1 image, p50 ms": lambda row: f"{row['latency_p50_ms']:.3f}",
    "1 image, p95 ms": lambda row: f"{row['latency_p95_ms']:.3f}",
    f"{BATCH}: images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "  quartiles": _quartiles,
    "  stable": lambda row: "yes" if row["batches"]["stable"] else "no",
    "test accuracy": lambda row: f"{row['accuracy']:.4f}",
    "difference": lambda row: f"{row['largest_difference']:.1e}",
}


def _figure(rows: list[dict[str, Any]]) -> Figure:
    """Draws latency, throughput and size of each format, side by side."""
    figure = Figure(figsize=(11, 0.45 * len(rows) + 0.8), layout="constrained")
    panels = (
        ("ms for one image: p50", "latency_p50_ms", "{:.3f}"),
        (f"images/s in batches of {BATCH}", "images_per_second", "{:,.0f}"),
        ("bytes", "bytes", "{:,}"),
    )
    for axes, (title, column, text) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        bars = axes.barh([row["format"] for row in rows], [row[column] for row in rows])
        axes.bar_label(bars, fmt=text, padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.3)
        axes.xaxis.set_visible(False)
    axes.invert_yaxis()  # the panels share their y axis
    return figure
