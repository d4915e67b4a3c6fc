"""Facts about runs, read from their files without TensorFlow."""

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from trainer.config_file import flatten
from trainer.errors import InputError, did_you_mean
from trainer.run import Run, open_run

# Parts of the names of scores whose lower values are better.
_LOWER_IS_BETTER = re.compile("loss|error|entropy|divergence|hinge|poisson|false_")


class RunRecord(NamedTuple):
    """A run, its summary (empty: not finished), its configuration by dotted key, and its columns.

    Columns are other facts by name. The scores are `val_NAME` and `test_NAME`.
    """

    run: Run
    summary: dict[str, Any]
    config: dict[str, Any]
    columns: dict[str, Any]


def read_record(run: Run) -> RunRecord:
    """Reads a run. Files that cannot be read make its state "damaged"."""
    summary, config = {}, {}
    state = "training" if _is_locked(run) else "finished" if run.finished else _how_ended(run)
    try:
        config = flatten(tomllib.loads((run.path / "config.toml").read_text(encoding="utf-8")))
        summary = run.read_json("summary.json") if run.finished else {}
        json.dumps(summary, allow_nan=False)
        tables = [summary.get(key) or {} for key in ("data", "seconds", "validation", "test")]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError("a table of summary.json is another value")
    except (InputError, OSError, TypeError, ValueError, RecursionError):
        state, summary = "damaged", {}
    facts, data = flatten(summary), config.get("data.name")
    if path := config.get("data.options.path"):  # of a folder, a table or arrays
        data = f"{data}:{Path(str(path)).name}"
    columns = {"name": run.name, "state": state, "data": data}
    columns |= {"network": config.get("model.name"), "parameters": facts.get("parameters")}
    columns |= {"epochs": facts.get("epochs", run.trained_epochs), "step_ms": facts.get("step_ms")}
    columns |= {"seconds": facts.get("seconds.total"), "size_mb": folder_mb(run.path)}
    prefixes = {"validation": "val_", "test": "test_"}
    if config.get("data.train_on_validation"):
        del prefixes["validation"]  # scores of training images cannot be compared
    for split, prefix in prefixes.items():
        scores = summary.get(split) or {}
        columns |= {prefix + k: v for k, v in scores.items() if isinstance(v, int | float)}
    return RunRecord(run, summary, config, columns)


def list_records(folder: str) -> list[RunRecord]:
    """Reads all runs of a folder, newest first. Names without a time come last."""
    names = [path.parent.name for path in Path(folder).glob("*/config.toml")]
    names.sort(key=lambda name: (bool(re.match(r"\d{8}T\d{6}Z-", name)), name), reverse=True)
    return [read_record(Run(Path(folder, name))) for name in names]


def open_records(names: Iterable[str], folder: str) -> list[RunRecord]:
    """Reads runs by name, also unfinished ones; see `open_run`."""
    return [read_record(open_run(name, runs_directory=folder, unfinished=True)) for name in names]


def values_of(key: str, records: Sequence[RunRecord], option: str) -> list[Any]:
    """Returns a column or a key of the configuration of each run; None: the run has no such key."""
    known = {name for record in records for name in (*record.columns, *record.config)}
    if records and key not in known:
        near = {name for name in known if ("." in name) == ("." in key)}  # else too many
        raise InputError(f"{option}: unknown key {key!r}: {did_you_mean(key, near, shown=20)}")
    return [record.columns.get(key, record.config.get(key)) for record in records]


def filter_records(records: Sequence[RunRecord], conditions: Iterable[str]) -> list[RunRecord]:
    """Returns the runs that meet all conditions, each "KEY=VALUE"."""
    for key, equals, text in (condition.partition("=") for condition in conditions):
        if not equals:
            raise InputError(f"--filter expected KEY=VALUE, received {key!r}")
        pairs = zip(values_of(key, records, "--filter"), records, strict=True)
        records = [record for value, record in pairs if to_text(value) == text]
    return list(records)


def sort_records(records: Sequence[RunRecord], key: str) -> list[RunRecord]:
    """Sorts runs: scores best first, everything else ascending. Runs without a value come last."""
    sign = -1 if key.startswith(("val_", "test_")) and not _LOWER_IS_BETTER.search(key) else 1

    def order(pair: tuple[Any, RunRecord]) -> tuple[bool, bool, Any]:
        value, number = pair[0], isinstance(pair[0], int | float)
        return value is None, not number, sign * value if number else to_text(value)

    pairs = zip(values_of(key, records, "--sort"), records, strict=True)
    return [record for _, record in sorted(pairs, key=order)]


def find_exports(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the versions in saved_models/ that were exported from runs, by name of the run."""
    found: dict[str, list[str]] = {}
    for path in sorted(Path("saved_models").glob("*/*/export.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            run = json.loads(path.read_text(encoding="utf-8"))["run"]
            found.setdefault(run, []).append(str(path.parent))
    return {name: found[name] for name in names if name in found}


def folder_mb(folder: Path) -> float:
    """Returns the size of all files below a folder in MB."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a training replaces its checkpoints
                total += os.lstat(f"{directory}/{name}").st_size
    return total / 1e6


def to_text(value: Any) -> str:
    """Returns a value as in JSON, and a string without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _how_ended(run: Run) -> str:
    """Returns the state of a run without scores from the last line of its log."""
    log = run.log.read_bytes() if run.log.is_file() else b""
    last = log.rstrip().rpartition(b"\n")[2]
    return "diverged" if b" ended: the loss became " in last else "unfinished"


def _is_locked(run: Run) -> bool:
    try:
        if (run.path / ".lock").exists():  # otherwise the test would create it
            filelock.FileLock(run.path / ".lock").acquire(timeout=0).lock.release()
    except OSError as error:
        return isinstance(error, filelock.Timeout)  # else the folder is read-only
    return False
