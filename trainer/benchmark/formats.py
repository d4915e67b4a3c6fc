"""`trainer benchmark formats`: size, loading time, speed and accuracy of each export format."""

import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trainer import data as datasets
from trainer.benchmark.result import BenchmarkResult
from trainer.benchmark.timing import run_interleaved, summary
from trainer.errors import CheckError, InputError, MissingError
from trainer.run import open_run
from trainer.saving.export import export
from trainer.saving.formats import FORMATS
from trainer.saving.versions import Verification, artifact_files, run_python

_logger = logging.getLogger(__name__)

BATCH = 256
QUICK = {"processes": 2, "calls": 200}  # calls: at batch 1, in each process
FULL = {"processes": 5, "calls": 1000}
_ONCE = ("import_seconds", "load_seconds", "first_call_seconds")  # measured once in each process
_COLUMNS = (
    *("format", "bytes", *_ONCE, "latency_p50_ms", "latency_p95_ms"),
    *("images_per_second", "batches", "accuracy", "largest_difference"),
)


def benchmark_formats(
    reference: str = "latest", *, runs_directory: str = "runs", quick: bool = False
) -> BenchmarkResult:
    """Exports a run to every available format and measures each on this machine.

    Each format is loaded several times, each time in a new process without any other runtime, in
    random order.

    The arguments are the options of `trainer benchmark formats`.

    Raises:
        CheckError: The process of a format fails.
    """
    run, budget = open_run(reference, runs_directory=runs_directory), QUICK if quick else FULL
    config = run.config()
    data = datasets.load(config.data)
    images = data.test.read(slice(BATCH))[0]
    exports, turns, skipped = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        # A small test set is repeated.
        np.save(Path(folder) / "images.npy", np.resize(images, (BATCH, *images.shape[1:])))
        for kind, format_ in FORMATS.items():
            _logger.info("exporting %s", kind)
            try:
                version, exported = export(str(run.path), kind, name="model", directory=folder)
            except (MissingError, CheckError, InputError) as error:
                skipped[kind] = str(error)
                continue
            processes: list[dict[str, Any]] = []
            program = [kind, f"{version / format_.file}", f"{folder}/images.npy"]
            turns.append(functools.partial(_measure, [*program, str(budget["calls"])], processes))
            exports.append((kind, version / format_.file, exported.verified, processes))
        run_interleaved(turns, blocks=budget["processes"], seed=0)
        rows = [_row(*each) for each in exports]
    return BenchmarkResult(
        name="formats",
        subject=f"{run.name}: {data.spec.name}, {config.model.name}",
        rows=rows,
        columns=_COLUMNS,
        settings={"batch": BATCH, **budget},
        devices=["CPU:0"],
        x="format",
        fingerprint=data.spec.fingerprint,
        skipped=skipped,
    )


def _measure(arguments: list[str], processes: list[dict[str, Any]]) -> None:
    """Measures a format once, in a new process."""
    _logger.info("process %d of %s", len(processes) + 1, arguments[0])
    program = ["-m", "trainer.benchmark.format_process", *arguments]
    printed = run_python(program, f"{arguments[0]} cannot be measured")
    processes.append(json.loads(printed.splitlines()[-1]))


def _row(
    kind: str, artifact: Path, verified: Verification, processes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the row of a format. Times are those of all its processes together."""
    one, many = ([seconds for p in processes for seconds in p[key]] for key in ("one", "many"))
    return {
        "key": kind,
        "format": kind,
        "device": "CPU:0",
        "label": "1 image",
        "bytes": sum(file.stat().st_size for file in artifact_files(artifact)),
        **{name: float(np.median([p[name] for p in processes])) for name in _ONCE},
        "latency_p50_ms": 1000 * float(np.median(one)),
        "latency_p95_ms": 1000 * float(np.percentile(one, 95)),
        "images_per_second": BATCH / float(np.median(many)),
        "accuracy": verified.accuracy,
        "model_accuracy": verified.model_accuracy,
        "largest_difference": verified.largest_difference,
        "timing": summary(one),
        "batches": summary(many),
    }
