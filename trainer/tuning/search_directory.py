"""The directory of a search and the record of each trial.

runs/tune-<name>/
    search.toml       the complete configuration
    oracle/           state of keras-tuner: oracle.json
    trials/<id>/      run directories; <id>-<execution>/ if a trial has several executions
    trials/<id>.lock  held by the process that trains the trial
    records/<id>.json result of a trial, written last: a trial with a record is done
    tensorboard/      the HParams page: domains, and a session for each trial
    results.json  best.toml  refit-<id>/
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import filelock
from pydantic import Field

from trainer.config import Config, Section
from trainer.config_file import load_config
from trainer.errors import CheckError, InputError
from trainer.files import write_text
from trainer.run import Run
from trainer.tuning.config import TuningConfig, trial_config

# How the keys begin that can change when a search is continued.
_CHANGEABLE = ("logging.", "tuning.max_", "tuning.keep", "tuning.stop_on_failure")


class TrialRecord(Section):
    """The result of a trial."""

    trial: str  # its number, the name of its directories
    status: Literal["completed", "pruned", "failed"]  # the score of a pruned trial counts, too
    values: dict[str, Any]  # the tried values by dotted key
    epochs: int  # configured
    score: float | None = None  # the objective at the kept weights, averaged over executions
    scores: dict[str, float | None] = Field(default={})  # all validation metrics, in the same way
    trained_epochs: int = 0  # of the first execution
    seconds: float = 0.0  # time of all executions, interruptions excluded
    curve: list[float] = Field(default=[])  # the objective after each epoch of the first execution
    runs: list[str] = Field(default=[])  # run directories, relative to that of the search
    error: str | None = None  # one line for a user's error, a traceback for a defect


class SearchDirectory:
    """The directory of one search, and its configuration."""

    def __init__(self, config: Config, name: str | None = None) -> None:
        """Sets the paths; reads and writes nothing.

        Args:
            config: The configuration of the search.
            name: Name of the search; None: logging.name, or the names of data set and model.
        """
        default = re.sub(r"[^\w.-]+", "-", f"{config.data.name}-{config.model.name}")
        self.config = config
        self.tuning = config.table(TuningConfig)
        self.name = name or config.logging.name or default
        self.path = Path(config.logging.directory) / f"tune-{self.name}"
        self.config_file = self.path / "search.toml"
        self.oracle = self.path / "oracle" / "oracle.json"
        self.trials = self.path / "trials"
        self.tensorboard = self.path / "tensorboard"
        self.best = self.path / "best.toml"
        self._records = self.path / "records"
        # Held while a process changes the state; the system releases it if the process dies.
        self.lock = filelock.FileLock(self.path / ".lock")

    def create(self) -> None:
        """Creates the directory and writes the configuration, unless it has another search."""
        for folder in (self.oracle.parent, self.trials, self.tensorboard, self._records):
            folder.mkdir(parents=True, exist_ok=True)
        with self.lock:
            if self.config_file.exists() or self.oracle.exists():
                before = load_config(self.config_file, stored=True).flat()
                after = self.config.flat()
                fixed = [key for key in after if not key.startswith(_CHANGEABLE)]
                changed = [key for key in fixed if before.get(key) != after[key]]
                if changed:
                    raise InputError(
                        f"{self.path} belongs to another search: {', '.join(changed)} differ from "
                        f"{self.config_file.name}; choose another --name"
                    )
            write_text(self.config_file, self.config.to_toml())

    def trial_lock(self, trial: str) -> filelock.BaseFileLock:
        """Returns the lock that a process holds while it trains a trial."""
        return filelock.FileLock(self.trials / f"{trial}.lock")

    def records(self) -> dict[str, TrialRecord]:
        """Returns the records of all finished trials by trial, in the order of their numbers."""
        paths = [path for path in self._records.glob("*.json") if path.stem.isdecimal()]
        paths.sort(key=lambda path: int(path.stem))
        return {path.stem: TrialRecord.model_validate_json(path.read_bytes()) for path in paths}

    def write_record(self, record: TrialRecord) -> None:
        """Writes the record of a finished trial."""
        text = record.model_dump_json(indent=2) + "\n"
        write_text(self._records / f"{record.trial}.json", text)

    def ranked(self) -> list[TrialRecord]:
        """Returns the trials that have a score, the best first, equal ones in their order."""
        scored = [record for record in self.records().values() if record.score is not None]
        highest_first = self.tuning.direction == "max"
        return sorted(scored, key=lambda record: record.score or 0.0, reverse=highest_first)

    def refit_run(self) -> Run:
        """Returns the run directory for the refit of the best trial."""
        return Run(self.path / f"refit-{self.ranked()[0].trial}")

    def remove_weights(self) -> None:
        """Removes the weights and checkpoints of all trials except the best `tuning.keep`."""
        kept = self.ranked()[: self.tuning.keep]
        for record in self.records().values():
            for run in record.runs if record not in kept else ():
                for file in (self.path / run / "checkpoints").glob("*"):
                    file.unlink(missing_ok=True)

    def write_best(self) -> None:
        """Writes best.toml, the configuration of the best trial, if a trial has a score."""
        for best in self.ranked()[:1]:
            score = f"{self.tuning.objective} {best.score:.6g}"
            head = f"# Trial {best.trial} of tune-{self.name}, the best trial: {score}.\n"
            config = trial_config(self.config, best.values | {"training.epochs": best.epochs})
            write_text(self.best, head + config.to_toml())

    def write_results(self) -> dict[str, Any]:
        """Writes results.json, and returns its content."""
        records, ranked = self.records().values(), self.ranked()
        if not ranked:
            raise CheckError(f"none of {len(records)} trials has a score")
        document: dict[str, Any] = {
            "search": str(self.path),
            **self.tuning.model_dump(include={"objective", "direction", "algorithm"}),
            "best": ranked[0].model_dump() | {"config": str(self.best)},
            "seconds": round(sum(record.seconds for record in records), 1),
            "trials": [record.model_dump() for record in records],
        }
        run = self.refit_run()
        if run.finished:
            summary = run.read_json("summary.json")
            document["refit"] = {key: summary[key] for key in ("run", "test", "test_images")}
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        write_text(self.path / "results.json", text)
        return document
