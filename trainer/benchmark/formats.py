"""Compares the formats a model can be exported to: size, time to load, speed, and what is lost."""

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer import data as datasets
from trainer.benchmark.results import Result
from trainer.benchmark.timing import Timing, joined
from trainer.environment import describe_environment
from trainer.errors import CheckError, InputError, MissingError
from trainer.run import open_run
from trainer.saving.export import Verified, artefact_files, export
from trainer.saving.formats import FORMATS

_logger = logging.getLogger(__name__)

BATCH = 256


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        processes: That each format is loaded in.
        calls: At batch 1, in each process.
    """

    processes: int
    calls: int


QUICK, FULL = Effort(2, 200), Effort(5, 1000)


def benchmark_formats(
    reference: str = "latest", *, runs_directory: str = "runs", quick: bool = False, seed: int = 0
) -> Result:
    """Exports a run to every format there is and measures each on this machine.

    Each format is loaded several times, each time in a new process without any other runtime; the
    formats take turns in random order, so that what else the machine does hits all alike.

    Args:
        reference: A run directory, its name, or "latest".
        runs_directory: Folder that holds the run directories.
        quick: Measure less.
        seed: Of the order.

    Raises:
        InputError: There is no such run.
    """
    run = open_run(reference, runs_directory=runs_directory)
    effort = QUICK if quick else FULL
    config = run.config()
    data = datasets.load(config.data)
    images = data.test.read(slice(BATCH))[0]
    images = np.resize(images, (BATCH, *images.shape[1:]))  # a small test set is repeated
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        artefacts = _export_all(str(run.path), folder, skipped)
        turns = [kind for kind in artefacts for _ in range(effort.processes)]
        random.Random(seed).shuffle(turns)
        measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in artefacts}
        for number, kind in enumerate(turns, 1):
            _logger.info("process %d of %d: %s", number, len(turns), kind)
            measured[kind].append(_measure(kind, artefacts[kind][0], folder, effort))
        for kind, (path, verified) in artefacts.items():
            rows.append(_row(kind, _size(path), measured[kind], verified))
    return Result(
        name="formats",
        subject=f"{run.name}: {data.spec.name}, {config.model.name}",
        rows=rows,
        table=_table(rows) if rows else [],
        skipped=skipped,
        settings={"batch": BATCH, "seed": seed, **asdict(effort)},
        environment=describe_environment(("CPU:0",), data.spec.fingerprint),
        notes=[
            "stable: blocks agreed before counting began, and the quartiles lie within 10% of the "
            "median; difference: the largest of any probability from the float32 model's"
        ],
        figures={"figure": formats_figure(rows)} if rows else {},
    )


def formats_figure(rows: list[dict[str, Any]]) -> Figure:
    """Draws latency, throughput and size of each format, side by side."""
    names = [row["format"] for row in rows]
    figure = Figure(figsize=(11, 0.45 * len(rows) + 0.8), layout="constrained")
    panels = (
        ("ms for one image: p50 (p95)", "latency_p50_ms", "latency_p95_ms"),
        (f"images/s in batches of {BATCH}", "images_per_second", "images_per_second"),
        ("bytes", "bytes", "bytes"),
    )
    for axes, (title, key, end) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        axes.barh(names, [row[key] for row in rows], color="tab:blue")
        for row in rows:
            axes.hlines(row["format"], row[key], row[end], color="black")
            text = f" {row[key]:,.0f}"
            if key != end:
                text = f" {row[key]:.3f} ({row[end]:.3f})"
            axes.text(row[end], row["format"], text, va="center")
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.3)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()  # once: the panels share it
    return figure


def _export_all(run: str, folder: str, skipped: dict[str, str]) -> dict[str, tuple[Path, Verified]]:
    """Exports to every format whose packages are there; the others are noted with the reason."""
    artefacts = {}
    for kind, format_ in FORMATS.items():
        _logger.info("exporting %s", kind)
        try:
            version, exported = export(run, kind, name="model", directory=folder)
        except (MissingError, CheckError, InputError) as error:
            skipped[kind] = str(error)
            _logger.info("%s is left out: %s", kind, error)
        else:
            artefacts[kind] = version / format_.file, exported.verified
    return artefacts


def _measure(kind: str, artefact: Path, folder: str, effort: Effort) -> dict[str, Any]:
    """Measures a format once, in a new process."""
    # With the path of this process: no more (-P leaves the current folder out) and no less.
    program = [sys.executable, "-P", "-m", "trainer.benchmark.format_process"]
    done = subprocess.run(
        [*program, kind, str(artefact.absolute()), f"{folder}/images.npy", str(effort.calls)],
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
    kind: str, size: int, measured: list[dict[str, Any]], verified: Verified
) -> dict[str, Any]:
    one, many = (joined([_timing(m[key]) for m in measured]) for key in ("one", "many"))
    return {
        "key": kind,
        "format": kind,
        "bytes": size,
        "import_seconds": float(np.median([m["import_seconds"] for m in measured])),
        "load_seconds": float(np.median([m["load_seconds"] for m in measured])),
        "first_call_seconds": one.first_seconds,
        "latency_p50_ms": 1000 * one.median,
        "latency_p95_ms": 1000 * one.percentile(95),
        "images_per_second": BATCH / many.median,
        "accuracy": verified.accuracy,
        "model_accuracy": verified.model_accuracy,
        "largest_difference": verified.largest_difference,
        "timing": one.facts(),
        "batches": many.facts(),
        "loads_seconds": [m["load_seconds"] for m in measured],
    }


def _timing(plain: dict[str, Any]) -> Timing:
    return Timing(**plain | {"block_seconds": tuple(plain["block_seconds"])})


def _table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns a column for each format: there are more figures than formats."""
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
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
    return [
        {"": title} | {row["format"]: show(row) for row in rows} for title, show in lines.items()
    ]


def _quartiles(row: dict[str, Any]) -> str:
    low, high = (BATCH / seconds for seconds in reversed(row["batches"]["quartiles_seconds"]))
    return f"{low / 1000:.1f}k-{high / 1000:.1f}k"


def _size(artefact: Path) -> int:
    folder = artefact if artefact.is_dir() else artefact.parent
    return sum((folder / name).stat().st_size for name in artefact_files(folder, artefact))
