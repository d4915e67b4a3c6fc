"""The directory of a search, and what it remembers of each trial.

runs/tune-<name>/
    search.toml       the configuration, complete
    oracle/           what keras-tuner has chosen so far
    trials/<id>/      run directories; <id>-<execution>/ where a trial has several
    records/<id>.json what came of a trial; written last: a trial that has one is done
    tensorboard/      the HParams page: domains, and a session a trial
    logs/  workers/   what each worker said; a lock that shows that it is there
    seconds.json      how long it has taken
    results.json  best.toml  refit.toml  refit/
"""

import contextlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import filelock
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trainer.config import Config, parse_config
from trainer.errors import InputError
from trainer.files import write_text

# What a person may change between two starts of one search.
_CHANGEABLE = {"trials", "seconds", "keep", "stop_on_failure"}


_T = TypeVar("_T")
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Record:
    """What came of a trial.

    Attributes:
        trial: Its number, by which its directories are named.
        status: "pruned" is a trial that was ended early because others were better; it counts.
        score: The objective of the weights that were kept, the mean over executions.
        scores: All validation scores, the same way.
        values: What was tried, by dotted key.
        epochs: How many the trial had.
        trained_epochs: How many it took.
        seconds: Of all its executions, interruptions not counted.
        curve: The objective after each epoch of the first execution.
        runs: Its run directories, within that of the search.
        error: What went wrong: one line of a mistake, the traceback of a defect.
    """

    trial: str
    status: Literal["completed", "pruned", "failed"]
    score: float | None
    scores: dict[str, float | None]
    values: dict[str, Any]
    epochs: int
    trained_epochs: int
    seconds: float
    curve: list[float]
    runs: list[str]
    error: str | None = None


@dataclass(frozen=True, config=_STRICT)
class _Time:
    """What seconds.json holds."""

    seconds: float


class SearchFolder:
    """One directory of a search."""

    def __init__(self, runs: str, name: str) -> None:
        """Names it; nothing is read or written.

        Args:
            runs: Folder that holds the run directories.
            name: Of the search.
        """
        self.name = name
        self.path = Path(runs) / f"tune-{name}"
        self.oracle = self.path / "oracle"
        self.trials = self.path / "trials"
        self.tensorboard = self.path / "tensorboard"
        self.best = self.path / "best.toml"
        self._records = self.path / "records"
        self._workers = self.path / "workers"

    def config(self) -> Config:
        """Reads the configuration of the search.

        Raises:
            InputError: It is missing or damaged.
        """
        path = self.path / "search.toml"
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        return parse_config(tree, origin=str(path))

    def require_same(self, config: Config) -> None:
        """Refuses to go on with a search by another configuration than it began with.

        Raises:
            InputError: With what differs; or that nothing tells what it began with.
        """
        if not (self.path / "search.toml").exists():
            if self._recorded() or (self.oracle / "oracle.json").exists():
                raise InputError(
                    f"{self.path} holds a search without its search.toml: put that back, or choose "
                    "another --name"
                )
            return
        before, after = (_compared(c) for c in (self.config(), config))
        differing = [
            f"{key} = {before.get(key)!r} (received {after.get(key)!r})"
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        ]
        if differing:
            raise InputError(
                f"{self.path} is a search of its own: it goes on by {', '.join(differing)}; "
                "choose another --name for another search"
            )

    def create(self, config: Config) -> None:
        """Makes the directory where it is not there, and notes the configuration.

        Raises:
            InputError: It cannot be written.
        """
        own = (self.oracle, self.trials, self.tensorboard, self._records, self._workers)
        with self._writing():
            for folder in (*own, self.path / "logs"):
                folder.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "search.toml", config.to_toml())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from leading this search; the system ends it with ours.

        Raises:
            InputError: Another process does, or one of its workers is still there.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        with _lock(self.path / ".lock", 0, f"{self.path} is being searched by another process"):
            for path in sorted(self._workers.glob("*.lock")):
                # Of a search whose chief was killed: it saves its trial, and ends by itself.
                with _lock(path, 60, f"{path.stem} of an earlier start of {self.path} still runs"):
                    pass
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = error.filename2 or error.filename or self.path
            raise InputError(
                f"{path} cannot be written ({error.strerror}): move what is there away, or choose "
                "another folder with --set logging.directory=..."
            ) from None

    @contextlib.contextmanager
    def worker(self, worker: str) -> Iterator[None]:
        """Shows, for as long as it lasts, that a worker is there.

        Raises:
            InputError: There is another of this name.
        """
        with _lock(self._workers / f"{worker}.lock", 5, f"there is a {worker} already"):
            yield

    def log(self, worker: str) -> Path:
        """Returns the file that takes what a worker says."""
        return self.path / "logs" / f"{worker}.txt"

    def records(self) -> list[Record]:
        """Returns what came of each trial that is done, in their order."""
        found = [self.record(trial) for trial in self._recorded()]
        return [record for record in found if record is not None]

    def _recorded(self) -> list[str]:
        """Returns the trials that have a record, in their order."""
        names = [path.stem for path in self._records.glob("*.json")]
        return sorted((name for name in names if name.isdecimal()), key=int)

    def record(self, trial: str) -> Record | None:
        """Returns what came of a trial; None: it is not done."""
        path = self._records / f"{trial}.json"
        if not path.exists():
            return None
        record = _read(path, Record)
        if record.trial != trial:
            raise _damaged(path, f"it is of trial {record.trial}")
        return record

    def write_record(self, record: Record) -> None:
        """Notes that a trial is done, whole or not at all."""
        text = json.dumps(asdict(record), indent=2, allow_nan=False)
        write_text(self._records / f"{record.trial}.json", text + "\n")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one of the search's JSON files, whole or not at all."""
        with self._writing():
            write_text(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def seconds(self) -> float:
        """Returns how long the search has taken before."""
        path = self.path / "seconds.json"
        return _read(path, _Time).seconds if path.exists() else 0.0

    def keep_best(self, count: int, direction: str) -> None:
        """Removes the weights and checkpoints of all trials that are done but the best.

        Args:
            count: How many to leave.
            direction: "max" or "min".
        """
        records = self.records()
        kept = {record.trial for record in ranked(records, direction)[:count]}
        for record in records:
            if record.trial not in kept:
                for run in record.runs:
                    for file in (self.path / run / "checkpoints").glob("*"):
                        file.unlink(missing_ok=True)


def ranked(records: list[Record], direction: str) -> list[Record]:
    """Returns the trials that have a score, the best first; of equals the earlier."""
    sign = -1 if direction == "max" else 1
    scored = [record for record in records if record.score is not None]
    return sorted(scored, key=lambda record: (sign * (record.score or 0.0), int(record.trial)))


def _compared(config: Config) -> dict[str, Any]:
    """Returns what must stay the same over a search, by dotted key."""
    tree = config.model_dump(exclude={"logging": True, "tuning": _CHANGEABLE})
    flat = {f"{s}.{k}": v for s, table in tree.items() for k, v in table.items()}
    space = flat.pop("tuning.space")
    return flat | {f"tuning.space.{key}": parameter for key, parameter in space.items()}


def _read(path: Path, kind: type[_T]) -> _T:
    """Reads one of the search's JSON files as what it must hold.

    Raises:
        InputError: It is damaged.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise _damaged(path, f"{where}: {fault['msg']}" if where else fault["msg"]) from None
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} is damaged ({why}): put back what was there, or choose another --name"
    )


@contextlib.contextmanager
def _lock(path: Path, seconds: float, taken: str) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        raise InputError(taken) from None
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()
