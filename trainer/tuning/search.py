"""`trainer tune`: checks the configuration, runs the search, writes the results."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import keras
import numpy as np
from rich.console import Console

from trainer import devices
from trainer.config import Config, load_config
from trainer.errors import InputError, MissingError, StoppedError, did_you_mean
from trainer.experiment import (
    Experiment,
    PhaseTimer,
    build_experiment,
    compiled_model,
)
from trainer.files import require_writable
from trainer.training.augmentation import make_augmentation
from trainer.training.optimizer import try_optimizer
from trainer.training.user_callbacks import make_callbacks
from trainer.tuning import results
from trainer.tuning.config import TuningConfig
from trainer.tuning.oracles import combinations
from trainer.tuning.search_directory import SearchDirectory
from trainer.tuning.space import check_space, direction_of, extremes
from trainer.tuning.trial import train_or_resume
from trainer.tuning.workers import Worker, started_workers, stop_with_parent

_log = logging.getLogger(__name__)


def tune(
    config: Config,
    *,
    name: str | None = None,
    workers: int = 1,
    refit: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Searches the space of a configuration, or continues an interrupted search.

    Other processes can run the same search at the same time, also on other machines that share the
    folder of the runs.

    Args:
        config: The configuration. Its table [tuning] describes the search.
        name: Name of the search in `<runs>/tune-<name>`; None: logging.name or a default.
        workers: Processes that train at the same time, this one included.
        refit: Train the best trial on train and validation together, and score the test images.
        console: Shows the progress bar of the refit.

    Returns:
        The content of results.json; None in a process that another `tune` has started.

    Raises:
        InputError: The space does not fit the configuration, or the directory is damaged or holds
            another search.
        CheckError: No trial has a score, or too many failed.
        MissingError: A device of the space is missing.
        StoppedError: A signal stopped the search; the state is saved.
    """
    if devices.read_cluster() is not None:
        raise InputError(
            "each process of a search trains its own trials: expected no TF_CONFIG and no SLURM "
            "job step of several tasks, which join all processes in one training"
        )
    if chief := [variable for variable in sorted(os.environ) if variable.startswith("KERASTUNER_")]:
        raise InputError(
            f"expected no {', '.join(chief)}: a search has no chief. Start the same `trainer tune` "
            "command on each machine; the machines share the folder of the runs"
        )
    check_space(config)
    require_writable(config.logging.directory)
    search = SearchDirectory(config, name)
    if stop_with_parent():
        with _explained(search):
            Worker(search).run()
        return None
    search = SearchDirectory(_check_extremes(config), search.name)
    with _explained(search):
        search.path.mkdir(parents=True, exist_ok=True)
        with search.lock:
            search.create()
        if refit and search.ranked():
            _require_one_refit(search)  # before more trials are run
        oracle = _run_trials(search, workers)
        if refit and search.ranked():
            with filelock.FileLock(search.path / ".refit.lock"):  # other processes wait
                _refit(search, console)
        with search.lock:
            return results.write_results(search, oracle.seconds)


def _run_trials(search: SearchDirectory, workers: int) -> Any:
    """Runs the remaining trials and returns the oracle."""
    limit, done = search.tuning.max_trials, len(search.records())
    if done:
        _log.info("continuing %s: %d of %d trials are done", search.path, done, limit)
    beyond = islice(combinations(search.tuning), limit, None)
    if search.tuning.algorithm == "grid" and next(beyond, None) is not None:
        _log.warning("the grid has more points than tuning.max_trials = %d", limit)
    with started_workers(search, workers - 1):
        oracle = Worker(search).run()
    with search.lock:
        results.write_best(search)
    done = len(oracle.end_order)
    if done < limit:
        late, space = "tuning.max_seconds is used up", "the space has no more values"
        _log.info("%s: %d of %d trials", late if oracle.late else space, done, limit)
    return oracle


def _check_extremes(config: Config) -> Config:
    """Builds the objects of every end and choice of the space before any of them is trained.

    Returns:
        The configuration with the direction and a fallback of the data set resolved.

    Raises:
        InputError: Something does not fit together.
    """
    experiment = build_experiment(config, PhaseTimer())
    found = experiment.model.get_metrics_result().items()
    metrics = [f"val_{name}" for name, value in found if np.ndim(value) == 0]
    tuning = config.table(TuningConfig)
    if tuning.objective not in metrics:
        available = did_you_mean(tuning.objective, metrics)
        raise InputError(f"tuning.objective = {tuning.objective!r}: {available}")
    resolved = {
        "tuning.direction": direction_of(tuning),
        "data.name": experiment.config.data.name,
    }
    config = config.with_changes(resolved)
    built = []
    for name, extreme in extremes(config):
        parts = (extreme.model, extreme.optimizer, extreme.training, extreme.data.augmentation)
        if parts not in built and extreme.data.image_size == config.data.image_size:
            built.append(parts)
            try:
                _build(extreme, experiment)
            except (InputError, MissingError) as error:
                raise type(error)(f"tuning.space, {name}: {error}") from None
    keras.utils.clear_session()
    return config


def _build(config: Config, experiment: Experiment) -> None:
    """Builds every object that a trial's configuration names, except its data."""
    size, images = config.training.batch_size, experiment.data.spec.train
    if size > images:
        raise InputError(f"expected batches of at most {images} training images, received {size}")
    chosen = devices.select(config.training.device)
    with devices.dtype_policy(devices.choose_precision(config.training.precision, chosen)):
        compiled_model(config, experiment.data.spec)
        make_augmentation(config.data.augmentation, experiment.data)
    make_callbacks(config, experiment.model, Path("run"))
    try_optimizer(config.optimizer)


def _refit(search: SearchDirectory, console: Console | None) -> None:
    """Trains the best trial on train and validation together, and scores the test images once."""
    _require_one_refit(search)
    best = load_config(search.best, stored=True)
    # Without early stopping, because no validation images are left.
    callbacks = [
        callback.model_dump()
        for callback in best.training.callbacks
        if callback.name.lower() != "earlystopping"
    ]
    config = best.with_changes({"data.train_on_validation": True, "training.callbacks": callbacks})
    _log.info("refit    of %s on train and validation", search.best)
    train_or_resume(search.refit_run(), config, console=console)


def _require_one_refit(search: SearchDirectory) -> None:
    """Checks that no other trial was refitted."""
    path = search.refit_run().path
    others = [str(other) for other in search.path.glob("refit*") if other != path]
    if others:
        raise InputError(
            f"expected no {', '.join(others)}: a search scores the test images once, and another "
            "trial was refitted; without --refit the same command shows the results"
        )


@contextlib.contextmanager
def _explained(search: SearchDirectory) -> Iterator[None]:
    """Adds how to continue the search to the error of a signal, and explains failed writes."""
    try:
        yield
    except (StoppedError, KeyboardInterrupt, SystemExit) as stop:
        # The advice of StoppedError is about a run of the search.
        code = getattr(stop, "exit_code", getattr(stop, "code", 128 + signal.SIGINT))
        if code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise
        advice = f"continue with the same `trainer tune` command ({search.path})"
        raise StoppedError(code - 128, advice) from None
    except OSError as error:
        path = error.filename2 or error.filename or search.path
        raise InputError(
            f"{path} cannot be written ({error.strerror}): move it away, or choose another folder "
            "with --set logging.directory=..."
        ) from None
