"""The run directory: where everything about one training lies, and how it is written.

runs/<UTC time>-<name>/
    config.toml        the resolved configuration
    environment.json   versions, CPU, GPU, git revision, data fingerprint
    metrics.jsonl      a line an epoch
    classes.json       precision, recall and F1 of each class
    summary.json       written after training: a run without one is not finished
    checkpoints/  tensorboard/  log.txt  README.md
"""

import contextlib
import itertools
import json
import logging
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from trainer import files
from trainer.config import Config, parse_config
from trainer.errors import InputError, TrainerError, did_you_mean, shell_command

# What may change on resume besides [logging]: how long to train, and where. The rest defines what
# is trained. The options of a data module can name a folder, so the fingerprint of the data decides
# whether it is still the same. XLA computes the same step in another way.
_CHANGEABLE = {
    *("training.epochs", "training.device", "training.jit_compile"),
    *("training.checkpoint_seconds", "training.cluster_timeout_seconds"),
    *("data.directory", "data.archives", "data.options", "data.placement", "data.device_limit_mb"),
}


class ExistsError(InputError):
    """A run directory exists already."""


class Run:
    """One run directory."""

    def __init__(self, path: Path) -> None:
        """Names a directory; `new_runs` names new ones and `open_run` finds one."""
        self.path = path
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.weights = self.checkpoints / "final.weights.h5"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"

    @property
    def name(self) -> str:
        """The directory's name, by which commands take the run."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "summary.json").exists()

    @property
    def trained_epochs(self) -> int:
        """How many epochs have a line in metrics.jsonl."""
        return len(self.metrics.read_bytes().splitlines()) if self.metrics.is_file() else 0

    def owns(self, path: Path) -> bool:
        """Returns whether a path is the run directory or a file that the run itself writes."""
        own = ("config.toml", "environment.json", "summary.json", "classes.json", "README.md")
        paths = (self.path, self.metrics, self.log, *(self.path / name for name in own))
        return path.absolute() in [own.absolute() for own in paths]

    def create(self, config: Config) -> None:
        """Makes the directory and writes its config.toml.

        Args:
            config: The resolved configuration.

        Raises:
            ExistsError: The directory exists.
            InputError: The directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()  # fails where it exists: nothing is overwritten
            self.checkpoints.mkdir()
            self.write_text("config.toml", config.to_toml())
        except OSError as error:
            if isinstance(error, FileExistsError) and self.path.exists():
                raise ExistsError(
                    f"{self.path} exists already and is left as it is: choose another --name"
                ) from None
            raise InputError(
                f"the run directory {self.path} cannot be written ({error.strerror}): "
                "choose another folder with --set logging.directory=..."
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process from training into this run; the system ends it with ours.

        Raises:
            InputError: Another process trains into it.
        """
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"{self.path} is being trained by another process") from None
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()

    def continued(self, changed: Config) -> Config:
        """Returns the configuration to resume the run with.

        Args:
            changed: The configuration of the run, with the requested changes.

        Raises:
            InputError: The changes are about what is trained, not about where or how long; or they
                ask for fewer epochs than were trained.
        """
        own = self.config()
        if changed.training.epochs < self.trained_epochs:
            raise InputError(
                f"--resume: {self.name} has trained {self.trained_epochs} epochs: expected as many "
                f"or more, received {changed.training.epochs}"
            )
        before, after = (config.model_dump() for config in (own, changed))
        differing = [
            f"{section}.{key} = {value!r} (received {after[section][key]!r})"
            for section, table in before.items()
            for key, value in table.items()
            if after[section][key] != value
            and section != "logging"
            and f"{section}.{key}" not in _CHANGEABLE
        ]
        if differing:
            raise InputError(
                f"--resume: {self.name} continues with its own {', '.join(differing)}; "
                f"may change: logging.*, {', '.join(sorted(_CHANGEABLE))}"
            )
        return changed

    def reopen(self, config: Config) -> None:
        """Writes the configuration of a resumed run, and keeps the summary of a finished one.

        Args:
            config: The configuration that the training continues with.
        """
        if self.finished:
            old = self.path / f"summary-{self.trained_epochs}-epochs.json"
            (self.path / "summary.json").rename(old)
        self.write_text("config.toml", config.to_toml())

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Also writes what the package logs to log.txt, and what ends the run before its time."""
        handler = logging.FileHandler(self.log, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("trainer")
        logger.addHandler(handler)
        level = logger.level
        logger.setLevel(logging.DEBUG)
        try:
            yield
        except TrainerError as error:
            # Its cause has the traceback of an error in code of the user.
            logger.debug("ended: %s", error, exc_info=error.__cause__ is not None)
            raise
        except BaseException:
            logger.debug("ended", exc_info=True)
            raise
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            handler.close()

    def config(self) -> Config:
        """Reads the run's own configuration.

        Raises:
            InputError: It is missing or damaged.
        """
        path = self.path / "config.toml"
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        missing = Config.model_fields.keys() - tree.keys()
        if missing:  # a run's configuration is written whole: defaults would not be what it used
            raise InputError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
        return parse_config(tree, origin=str(path), stored=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads one of the run's JSON files.

        Raises:
            InputError: It is missing or damaged.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected a JSON object, received {type(content).__name__}")
        return content

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes one of the run's JSON files, whole or not at all."""
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes one of the run's text files, whole or not at all."""
        files.write_text(self.path / name, text)


def new_runs(config: Config, name: str) -> Iterator[Run]:
    """Yields new run directories, the first choice first; `create` fails if one is taken meanwhile.

    Args:
        config: Names the folder that holds the run directories.
        name: Follows the time in the name of the directory.
    """
    return map(Run, _new_paths(config.logging.directory, name))


def make_directory(folder: str, name: str) -> Path:
    """Makes a directory whose name begins with the time of day.

    Processes that start in the same second get different directories: mkdir decides.

    Args:
        folder: Holds the directory; it is made if it does not exist.
        name: Follows the time in the name of the directory.

    Returns:
        The new directory.

    Raises:
        InputError: It cannot be written.
    """
    for path in _new_paths(folder, name):
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.exists():
                continue  # another process was faster
            raise InputError(f"{path} cannot be written: {error}") from None
        break
    return path


def _new_paths(folder: str, name: str) -> Iterator[Path]:
    """Yields paths that begin with the time of day and do not exist yet."""
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = Path(folder) / f"{time}-{name}"
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return (each for each in itertools.chain([path], others) if not each.exists())


def _age(name: str) -> tuple[bool, str]:
    """Orders runs by the time in their names; a folder that was renamed comes before them all."""
    return re.match(r"\d{8}T\d{6}Z-", name) is not None, name


def _is_run(reference: str) -> bool:
    try:
        return (Path(reference) / "config.toml").is_file()
    except OSError:  # a name too long for the file system names nothing
        return False


def open_run(reference: str, *, runs_directory: str = "runs", unfinished: bool = False) -> Run:
    """Finds a run.

    Args:
        reference: A run directory, its name, the name that `--name` gave (the newest of that
            name), or "latest" (the newest).
        runs_directory: Folder that holds the run directories.
        unfinished: Also take a run that is not finished; else the newest means the newest
            finished one.

    Raises:
        InputError: There is no such run, or it is not finished.
    """
    runs = {
        p.parent.name: Run(p.parent) for p in sorted(Path(runs_directory).glob("*/config.toml"))
    }
    named = [name for name in runs if reference in ("latest", name.partition("-")[2])]
    if reference == "latest" and not runs:
        raise InputError(f"there is no run in {runs_directory}: `trainer fit` makes one")
    if named:
        # An unfinished run newer than the newest finished one hides nothing.
        run = runs[max(named, key=lambda name: (unfinished or runs[name].finished, _age(name)))]
    elif _is_run(reference):
        run = Run(Path(reference))
    elif reference in runs:
        run = runs[reference]
    else:
        known = (
            did_you_mean(reference, [*runs, "latest"])
            if runs
            else f"there is no run in {runs_directory}"
        )
        raise InputError(f"there is no run {reference!r}: {known}")
    if not (run.finished or unfinished):
        done = [name for name, r in runs.items() if r.finished]
        newest = f"the newest finished one is {max(done)}" if done else "no run is finished"
        advice = f"go on with `{shell_command('fit', '--resume', run.path)}`"
        raise InputError(f"run {run.name} is not finished: {advice}; {newest}")
    return run
