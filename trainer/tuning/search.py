"""`trainer tune`: checks the configuration, runs the search, writes the results."""

import logging
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

from trainer.cluster import read_cluster
from trainer.config import Config, load_config
from trainer.errors import InputError, MissingError, StoppedError, did_you_mean, expect
from trainer.experiment import PhaseTimer, build_experiment
from trainer.files import require_writable
from trainer.training.user_callbacks import make_callbacks
from trainer.tuning.config import TuningConfig
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
    if read_cluster() is not None:
        raise InputError(
            "each process of a search trains its own trials: expected no TF_CONFIG and no SLURM "
            "job step of several tasks, which join all processes in one training"
        )
    check_space(config)
    require_writable(config.logging.directory)
    search = SearchDirectory(config, name)
    try:
        if stop_with_parent():
            Worker(search).run()
            return None
        search = SearchDirectory(_check_extremes(config), search.name)
        search.create()
        seconds = _run_trials(search, workers)
        if refit and search.ranked():
            with search.trial_lock("refit"):  # other processes wait
                _refit(search, console)
        with search.lock:
            return search.write_results(seconds)
    except StoppedError as stop:  # its advice is about a run of the search
        advice = f"continue with the same `trainer tune` command ({search.path})"
        raise StoppedError(stop.exit_code - 128, advice) from None
    except OSError as error:
        raise InputError(f"{search.path} cannot be written: {error}") from None


def _run_trials(search: SearchDirectory, workers: int) -> float:
    """Runs the remaining trials, and returns the seconds of the search."""
    limit, done = search.tuning.max_trials, len(search.records())
    if done:
        _log.info("continuing %s: %d of %d trials are done", search.path, done, limit)
    with started_workers(search, workers - 1):
        oracle = Worker(search).run()
    with search.lock:
        search.write_best()
    done = len(oracle.end_order)
    if done < limit:
        late, space = "tuning.max_seconds is used up", "the space has no more values"
        _log.info("%s: %d of %d trials", late if oracle.late else space, done, limit)
    return float(oracle.seconds)


def _check_extremes(config: Config) -> Config:
    """Builds the objects of every end and choice of the space before any of them is trained.

    Returns:
        The configuration with the direction and a fallback of the data set resolved.

    Raises:
        InputError: Something does not fit together.
    """
    tuning = config.table(TuningConfig)
    experiment = build_experiment(config, PhaseTimer())
    found = experiment.model.get_metrics_result().items()
    metrics = [f"val_{name}" for name, value in found if np.ndim(value) == 0]
    if tuning.objective not in metrics:
        available = did_you_mean(tuning.objective, metrics)
        raise InputError(f"tuning.objective = {tuning.objective!r}: {available}")
    name = experiment.config.data.name
    config = config.with_changes({"tuning.direction": direction_of(tuning), "data.name": name})
    for name, extreme in extremes(config):
        try:
            experiment = build_experiment(extreme, PhaseTimer())
            experiment.batches("train", shuffled=True)
            make_callbacks(extreme, experiment.model, Path("run"))
        except (InputError, MissingError) as error:
            raise type(error)(f"tuning.space, {name}: {error}") from None
    keras.utils.clear_session()
    return config


def _refit(search: SearchDirectory, console: Console | None) -> None:
    """Trains the best trial on train and validation together, and scores the test images once."""
    run, best = search.refit_run(), load_config(search.best, stored=True)
    others = [str(path) for path in search.path.glob("refit-*") if path != run.path]
    expect(not others, "--refit scores the test images", "one refit per search", others)
    # Without early stopping, because no validation images are left.
    callbacks = [
        callback.model_dump()
        for callback in best.training.callbacks
        if callback.name.lower() != "earlystopping"
    ]
    config = best.with_changes({"data.train_on_validation": True, "training.callbacks": callbacks})
    _log.info("refit    of %s on train and validation", search.best)
    train_or_resume(run, config, console=console)
