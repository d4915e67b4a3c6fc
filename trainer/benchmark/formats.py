"""`trainer benchmark formats`: size, loading time, speed and accuracy of each export format."""

import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer import data as datasets
from trainer.benchmark.result import BenchmarkResult, Columns, spread_text, time_text
from trainer.benchmark.timing import run_interleaved, summary
from trainer.errors import CheckError, InputError, MissingError
from trainer.run import open_run
from trainer.saving.export import export
from trainer.saving.formats import FORMATS
from trainer.saving.versions import Verification, artefact_files

_logger = logging.getLogger(__name__)

BATCH = 256
_COLUMNS: Columns = {
    "": ("format", ""),
    "bytes": ("bytes", ","),
    "import": ("import_seconds", time_text),
    "load": ("load_seconds", time_text),
    "first call": ("first_call_seconds", time_text),
    "1 image, p50 ms": ("latency_p50_ms", ".3f"),
    "1 image, p95 ms": ("latency_p95_ms", ".3f"),
    f"{BATCH}: images/s": ("images_per_second", ",.0f"),
    "  IQR": ("batches", spread_text),
    "test accuracy": ("accuracy", ".4f"),
    "difference": ("largest_difference", ".1e"),
}
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
        measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in artefacts}
        turns = [
            functools.partial(_measure, kind, path, folder, budget["calls"], measured[kind])
            for kind, (path, _) in artefacts.items()
        ]
        run_interleaved(turns, blocks=budget["processes"], seed=seed)
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
        devices=["CPU:0"],
        fingerprint=data.spec.fingerprint,
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


def _measure(
    kind: str, artefact: Path, folder: str, calls: int, measured: list[dict[str, Any]]
) -> None:
    """Measures a format once, in a new process that has the module path of this one."""
    _logger.info("process %d of %s", len(measured) + 1, kind)
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
    measured.append(json.loads(done.stdout.splitlines()[-1]))


def _row(
    kind: str, artefact: Path, measured: list[dict[str, Any]], verified: Verification
) -> dict[str, Any]:
    """Returns the row of a format. Times are those of all its processes together."""
    one, many = ([seconds for m in measured for seconds in m[key]] for key in ("one", "many"))
    once = ("import_seconds", "load_seconds", "first_call_seconds")
    return {
        "key": kind,
        "format": kind,
        "bytes": sum(file.stat().st_size for file in artefact_files(artefact)),
        **{name: float(np.median([m[name] for m in measured])) for name in once},
        "latency_p50_ms": 1000 * float(np.median(one)),
        "latency_p95_ms": 1000 * float(np.percentile(one, 95)),
        "images_per_second": BATCH / float(np.median(many)),
        "accuracy": verified.accuracy,
        "model_accuracy": verified.model_accuracy,
        "largest_difference": verified.largest_difference,
        "timing": summary(one),
        "batches": summary(many),
        "loads_seconds": [m["load_seconds"] for m in measured],
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
