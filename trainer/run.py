"""The run directory: its files, locking, and finding a run.

runs/<UTC time>-<name>/
    config.toml        the resolved configuration
    environment.json   versions, CPU, GPU, git revision, data fingerprint
    initial_weights.json   with training.init_from: the layers that were loaded, and their scores
    metrics.jsonl      one line per epoch
    classes.json       precision, recall and F1 of each class
    predictions.npz    label, predicted class and its probability, for each test image
    summary.json       scores and times; a run without it is not finished
    train/  validation/  test/  events.out.tfevents.*  for TensorBoard
    checkpoints/  log.txt  README.md
"""

import contextlib
import json
import logging
import re
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from trainer import files
from trainer.config import Config, parse_config
from trainer.errors import InputError, TrainerError, did_you_mean, shell_command

# Keys besides [logging] that may change on resume: they do not define what is trained. Options of
# the data are among them, because they can name a folder: the fingerprint of the data is compared.
_CHANGEABLE = {"data.archives", "data.device_limit_mb", "data.directory", "data.options"}
_CHANGEABLE |= {"data.placement", "training.checkpoint_seconds", "training.epochs"}
_CHANGEABLE |= {"training.cluster_timeout_seconds", "training.device", "training.jit_compile"}
_TIME = re.compile(r"\d{8}T\d{6}Z-")  # the start of the name of a run directory
_FILES = (
    "config.toml",
    "environment.json",
    "initial_weights.json",
    "summary.json",
    "classes.json",
    "predictions.npz",
    "README.md",
)


class Run:
    """A run directory.

    Attributes:
        path: The directory.
        name: Its name, which commands accept.
    """

    def __init__(self, path: Path) -> None:
        """Stores paths, without a check; see `make_directory` and `open_run`."""
        self.path = path
        self.name = path.name
        self.checkpoints = path / "checkpoints"
        self.weights = self.checkpoints / "final.weights.h5"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"

    @property
    def finished(self) -> bool:
        """Whether the training was completed."""
        return (self.path / "summary.json").exists()

    @property
    def trained_epochs(self) -> int:
        """The number of lines in metrics.jsonl."""
        return len(self.metrics.read_bytes().splitlines()) if self.metrics.is_file() else 0

    def final_weights(self) -> Path:
        """Returns the file of the final weights of a finished run; InputError if it is damaged."""
        expected = self.read_json("summary.json").get("weights_sha256")
        found = files.sha256(self.weights) if self.weights.is_file() else "no file"
        if found != expected:
            raise InputError(
                f"{self.weights} is damaged: expected sha256 {expected}, found {found}"
            )
        return self.weights

    def owns(self, path: Path) -> bool:
        """Returns whether a path is the run directory or a file that the run itself writes."""
        own = (self.path, self.metrics, self.log, *(self.path / name for name in _FILES))
        return path.absolute() in [each.absolute() for each in own]

    def begin(self, config: Config) -> None:
        """Writes the configuration of a new or resumed run. A finished run is unfinished then."""
        if self.finished:
            old = self.path / f"summary-{self.trained_epochs}-epochs.json"
            (self.path / "summary.json").rename(old)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.write_text("config.toml", config.to_toml())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Prevents other processes from training this run. The lock ends with this process.

        Raises:
            InputError: Another process is training it.
        """
        try:
            lock = filelock.FileLock(self.path / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"{self.path} is being trained by another process") from None
        with lock:
            yield

    def check_changes(self, changed: Config) -> None:
        """Raises InputError if the run cannot be resumed with a changed configuration.

        A finished run needs more epochs, others at least the epochs that they have begun. Settings
        of what is trained cannot change.
        """
        own, trained = self.config(), self.trained_epochs
        configured = own.training.epochs
        minimum = configured + 1 if self.finished else min(trained + 1, configured)
        if changed.training.epochs < minimum:
            state = "is finished, after" if self.finished else "has trained"
            raise InputError(
                f"run {self.name} {state} {trained} epochs: train it for longer with "
                f"--epochs {minimum} or more; received {changed.training.epochs}"
            )
        before, after = own.flat(), changed.flat()
        differing = [
            f"{key} = {before[key]!r} (received {after.get(key)!r})"
            for key in sorted(before.keys() - _CHANGEABLE)
            if after.get(key) != before[key] and not key.startswith("logging.")
        ]
        if differing:
            raise InputError(
                f"--resume: {self.name} cannot change {', '.join(differing)}; "
                f"may change: logging.*, {', '.join(sorted(_CHANGEABLE))}"
            )

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Writes the log of the package, and the traceback of an exception, to log.txt."""
        handler = logging.FileHandler(self.log, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("trainer")
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.DEBUG)
        try:
            yield
        except BaseException as error:
            # The cause of a TrainerError, if it has one, was raised in the user's code.
            expected = isinstance(error, TrainerError) and error.__cause__ is None
            logger.debug("ended: %s", error, exc_info=not expected)
            raise
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            handler.close()

    def config(self) -> Config:
        """Reads the run's own configuration; InputError if it is missing or damaged."""
        tree = self._read("config.toml", tomllib.loads)
        return parse_config(tree, origin=f"{self.path}/config.toml", stored=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads one of the run's JSON files; InputError if it is missing or damaged."""
        return self._read(name, json.loads)

    def _read(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        path = self.path / name
        try:
            return dict(parse(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one of the run's JSON files atomically."""
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes one of the run's text files atomically."""
        files.write_text(self.path / name, text)


def make_directory(directory: str, name: str) -> Path:
    """Creates a directory for a result. Its name is the time, `name`, and a number if it exists."""
    stem = f"{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}-{name}"
    path, number = Path(directory) / stem, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = path.with_name(f"{stem}-{number}")


def open_run(reference: str, *, runs_directory: str = "runs", unfinished: bool = False) -> Run:
    """Finds a run.

    Args:
        reference: A run directory, its name, the name that `--name` gave (the newest of that
            name), or "latest" (the newest).
        runs_directory: Folder that holds the run directories.
        unfinished: Also find runs that are not finished; otherwise only finished ones.

    Raises:
        InputError: There is no such run, or it is not finished.
    """
    paths = sorted(Path(runs_directory).glob("*/config.toml"))
    runs = {path.parent.name: Run(path.parent) for path in paths}
    finished = [name for name in runs if runs[name].finished]
    # A folder that was renamed, so that no time is in its name, is found by its own name only.
    named = [
        name
        for name in runs
        if reference == name or (_TIME.match(name) and reference in ("latest", _TIME.sub("", name)))
    ]
    if (Path(reference) / "config.toml").is_file():
        run = Run(Path(reference))
    elif named:
        # An unfinished run that is newer than the newest finished one does not hide it.
        run = runs[max(named, key=lambda name: (unfinished or name in finished, name))]
    elif runs:
        known = did_you_mean(reference, [*runs, "latest"])
        raise InputError(f"there is no run {reference!r}: {known}")
    else:
        raise InputError(f"there is no run in {runs_directory}: `trainer fit` creates one")
    if not (run.finished or unfinished):
        newest = f"the newest finished one is {max(finished)}" if finished else "no run is finished"
        advice = f"continue it with `{shell_command('fit', '--resume', run.path)}`"
        raise InputError(f"run {run.name} is not finished: {advice}; {newest}")
    return run
