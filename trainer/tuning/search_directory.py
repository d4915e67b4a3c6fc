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

import re
from pathlib import Path
from typing import Any, Literal

import filelock
from pydantic import Field, ValidationError

from trainer.config import Config, Section, load_config
from trainer.errors import InputError
from trainer.files import write_text
from trainer.run import Run
from trainer.tuning.config import TuningConfig

# Keys of [tuning] that can change when a search is continued.
_CHANGEABLE = {"max_trials", "max_seconds", "keep", "stop_on_failure"}


class TrialRecord(Section):
    """The result of a trial.

    Attributes:
        trial: The number of the trial, the name of its directories.
        status: "pruned": ended early because others were better. Its score counts.
        values: The tried values by dotted key.
        epochs: Configured epochs.
        score: The objective at the kept weights, averaged over executions.
        scores: All validation metrics, computed the same way.
        trained_epochs: Trained epochs of the first execution.
        seconds: Time of all executions, interruptions excluded.
        curve: The objective after each epoch of the first execution.
        runs: Run directories, relative to the directory of the search.
        error: Of a failed trial: one line for a user's error, a traceback for a defect.
    """

    trial: str
    status: Literal["completed", "pruned", "failed"]
    values: dict[str, Any]
    epochs: int
    score: float | None = None
    scores: dict[str, float | None] = Field(default={})
    trained_epochs: int = 0
    seconds: float = 0.0
    curve: list[float] = Field(default=[])
    runs: list[str] = Field(default=[])
    error: str | None = None

    @property
    def shown_values(self) -> dict[str, Any]:
        """The tried values and the epochs, which hyperband chooses."""
        return {**self.values, "training.epochs": self.epochs}


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
        self.oracle = self.path / "oracle"
        self.trials = self.path / "trials"
        self.tensorboard = self.path / "tensorboard"
        self.best = self.path / "best.toml"
        self._records = self.path / "records"
        # Held while a process changes the state. The operating system releases it if a process
        # dies. (Earlier versions hold it during the whole search.)
        self.lock = filelock.FileLock(self.path / ".lock")

    def create(self) -> None:
        """Creates the directory if necessary, and writes the configuration.

        Raises:
            InputError: The directory holds a search with another configuration, or search.toml is
                missing.
        """
        if self.config_file.exists():
            before = _compared(load_config(self.config_file, stored=True))
            after = _compared(self.config)
            differences = [
                f"{key} = {before.get(key)!r} (received {after.get(key)!r})"
                for key in before | after
                if before.get(key) != after.get(key)
            ]
            if differences:
                raise InputError(
                    f"{self.path} is a search with another configuration: "
                    f"{', '.join(differences)}; choose another --name for a new search"
                )
        elif any(self._records.glob("*")) or any(self.oracle.glob("oracle.json")):
            raise InputError(
                f"{self.path} holds a search without its search.toml: restore the file, or "
                "choose another --name"
            )
        for folder in (self.oracle, self.trials, self.tensorboard, self._records):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, self.config.to_toml())

    def trial_lock(self, trial: str) -> filelock.BaseFileLock:
        """Returns the lock that a process holds while it trains a trial."""
        return filelock.FileLock(self.trials / f"{trial}.lock")

    def record_file(self, trial: str) -> Path:
        """Returns the file of a trial's record. The trial is finished if the file exists."""
        return self._records / f"{trial}.json"

    def records(self) -> list[TrialRecord]:
        """Returns the records of all finished trials, in the order of their numbers."""
        names = [path.stem for path in self._records.glob("*.json") if path.stem.isdecimal()]
        return [self.record(trial) for trial in sorted(names, key=int)]

    def record(self, trial: str) -> TrialRecord:
        """Returns the record of a finished trial.

        Raises:
            InputError: The record is damaged.
        """
        path = self.record_file(trial)
        try:
            record = TrialRecord.model_validate_json(path.read_bytes())
            reason = "" if record.trial == trial else f"it belongs to trial {record.trial}"
        except ValidationError as error:
            fault = error.errors()[0]
            reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")
        if reason:
            raise InputError(
                f"{path} is damaged ({reason}): restore the file, or choose another --name"
            )
        return record

    def write_record(self, record: TrialRecord) -> None:
        """Writes the record of a finished trial."""
        write_text(self.record_file(record.trial), record.model_dump_json(indent=2) + "\n")

    def ranked(self) -> list[TrialRecord]:
        """Returns the trials that have a score, the best first, equal ones in their order."""
        scored = [record for record in self.records() if record.score is not None]
        highest_first = self.tuning.direction == "max"
        return sorted(scored, key=lambda record: record.score or 0.0, reverse=highest_first)

    def refit_run(self) -> Run:
        """Returns the run directory for the refit of the best trial."""
        return Run(self.path / f"refit-{self.ranked()[0].trial}")

    def remove_weights(self) -> None:
        """Removes the weights and checkpoints of all trials except the best `tuning.keep`."""
        kept = self.ranked()[: self.tuning.keep]
        for record in self.records():
            for run in record.runs if record not in kept else ():
                for file in (self.path / run / "checkpoints").glob("*"):
                    file.unlink(missing_ok=True)


def _compared(config: Config) -> dict[str, Any]:
    """Returns the keys that must not change during a search, by dotted key."""
    tree = config.model_dump(exclude={"logging": True, "tuning": _CHANGEABLE})
    flat = {f"{s}.{k}": v for s, table in tree.items() for k, v in table.items()}
    space = flat.pop("tuning.space")
    return flat | {f"tuning.space.{key}": parameter for key, parameter in space.items()}
