"""`trainer tune`: checks the configuration, runs the search, writes the results."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

from trainer import devices, workflow
from trainer.cluster import read_cluster
from trainer.config import Config, load_config
from trainer.errors import CheckError, InputError, MissingError, StoppedError, did_you_mean
from trainer.experiment import (
    Experiment,
    PhaseTimer,
    build_experiment,
    compiled_model,
)
from trainer.files import require_writable
from trainer.run import Run
from trainer.training.augmentation import make_augmentation
from trainer.training.optimizer import try_optimizer
from trainer.training.user_callbacks import make_callbacks
from trainer.tuning import results
from trainer.tuning import workers as parallel
from trainer.tuning.config import TuningConfig
from trainer.tuning.oracles import combinations, direction_of, make_oracle
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.space import check_space, extremes, short_names
from trainer.tuning.trial import run_trials

_log = logging.getLogger(__name__)

# So many failures in a row have a common cause, for example a full disk.
_MAX_FAILURES_IN_A_ROW = 5


def tune(
    config: Config,
    *,
    name: str | None = None,
    workers: int = 0,
    refit: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Searches the space of a configuration, or continues an interrupted search.

    Args:
        config: The configuration. Its table [tuning] describes the search.
        name: Name of the search, which is kept in `<runs>/tune-<name>`; None: logging.name, or the
            names of data set and model.
        workers: Processes that train at the same time; 0: only this one.
        refit: Train the best trial on train and validation together, and score the test images.
        console: Shows the progress bar of the refit.

    Returns:
        The content of results.json; None in a worker of a chief elsewhere.

    Raises:
        InputError: The space does not fit the configuration, or the directory is damaged or holds
            another search.
        CheckError: No trial has a score, or too many failed.
        MissingError: A device of the space, a worker or the chief is missing.
        StoppedError: A signal stopped the search; the state is saved.
    """
    member = parallel.membership()
    if member is not None and workers:
        raise InputError(
            "--workers starts a chief and workers on this machine: expected no KERASTUNER_TUNER_ID"
        )
    if read_cluster() is not None:
        raise InputError(
            "each worker of a search trains its own trials: expected no TF_CONFIG and no SLURM job "
            "step of several tasks, which join all processes in one training"
        )
    check_space(config)
    require_writable(config.logging.directory)
    search = SearchDirectory(config, name)
    if member is not None and "chief" not in member.name:
        with _explained(search):
            parallel.work(search, member)
        return None
    search = SearchDirectory(_check_extremes(config), search.name)
    search.stored()  # raises an error if it differs
    with _explained(search), search.locked():
        search.create()
        return _run_search(search, member, workers, refit=refit, console=console)


def _run_search(
    search: SearchDirectory,
    member: parallel.Member | None,
    workers: int,
    *,
    refit: bool,
    console: Console | None,
) -> dict[str, Any]:
    """Runs the remaining trials, then the refit, and returns the content of results.json."""
    oracle = make_oracle(search)
    if refit and search.ranked():
        _refit_run(search)  # refuses a second refit before more trials are run
    progress = _Progress(search, oracle)
    try:
        if member is None and not workers:
            with _trial_logs_hidden():
                run_trials(search, oracle, "alone", progress.report)
        else:
            parallel.lead(search, oracle, member, workers, progress.report)
    finally:
        oracle.save()  # which notes the time of the search
    progress.report_end()
    document = results.write_results(search, oracle.seconds)
    if refit:
        refitted = _refit(search, console)
        document = results.write_results(search, oracle.seconds, refit=refitted)
    return document


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
    objective = tuning.objective
    if objective not in metrics:
        raise InputError(f"tuning.objective = {objective!r}: {did_you_mean(objective, metrics)}")
    direction, data = direction_of(tuning), experiment.config.data.name
    config = config.with_changes({"tuning.direction": direction, "data.name": data})
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
    if config.training.batch_size > experiment.data.spec.train:
        raise InputError(
            f"expected batches of at most {experiment.data.spec.train} training images, "
            f"received {config.training.batch_size}"
        )
    chosen = devices.select(config.training.device)
    with devices.dtype_policy(devices.choose_precision(config.training.precision, chosen)):
        compiled_model(config, experiment.data.spec)
        make_augmentation(config.data.augmentation, experiment.data)
    make_callbacks(config, experiment.model, Path("run"))
    try_optimizer(config.optimizer)


class _Progress:
    """Reports finished trials and keeps the files of the search up to date."""

    def __init__(self, search: SearchDirectory, oracle: Any) -> None:
        self._search = search
        self._tuning = search.tuning
        self._oracle = oracle
        self._reported = {record.trial for record in search.records()}
        self._failures = 0
        limit = self._tuning.max_trials
        if self._reported:
            done = len(self._reported)
            _log.info("continuing %s: %d of %d trials are done", search.path, done, limit)
        beyond = islice(combinations(self._tuning), limit, None)
        if self._tuning.algorithm == "grid" and next(beyond, None) is not None:
            _log.warning("the grid has more points than tuning.max_trials = %d", limit)

    def report(self) -> None:
        """Reports trials that ended since the last call, and removes weights that are not kept.

        Raises:
            CheckError: A trial failed, and the search must end.
        """
        ended = [trial for trial in list(self._oracle.end_order) if trial not in self._reported]
        for trial in ended:
            self._reported.add(trial)
            self._report_trial(self._search.record(trial))
        if ended:
            self._search.remove_weights()
            results.write_best(self._search)

    def report_end(self) -> None:
        """Logs the reason if the search ends with fewer trials than configured."""
        done, limit = len(self._search.records()), self._tuning.max_trials
        if done < limit:
            late = self._oracle.late
            reason = "tuning.max_seconds is used up" if late else "the space has no more values"
            _log.info("%s: %d of %d trials", reason, done, limit)

    def _report_trial(self, record: TrialRecord) -> None:
        tuning, names = self._tuning, short_names(self._tuning.space)
        values = "  ".join(f"{names[key]} {value}" for key, value in record.values.items())
        title = f"trial {record.trial} ({len(self._reported)} of {tuning.max_trials})"
        if record.score is None:
            _log.warning("%s failed: %s\n%s", title, record.error, values)
            self._failures += 1
            limit = 1 if tuning.stop_on_failure else _MAX_FAILURES_IN_A_ROW
            if self._failures >= limit:
                last = (record.error or "").strip().splitlines()[-1]
                raise CheckError(f"the search ends after {limit} failed trials in a row: {last}")
            return
        self._failures = 0
        best = self._search.ranked()[0]
        score = f"{tuning.objective} {record.score:.5g}"
        score += " pruned" if record.status == "pruned" else ""
        score += f"  best {best.score:.5g} (trial {best.trial})"
        end = f"epochs {record.trained_epochs}, {record.seconds:.1f} s"
        _log.info("%s  %s  %s  %s", title, score, values, end)


def _refit(search: SearchDirectory, console: Console | None) -> dict[str, Any]:
    """Trains the best trial on train and validation together, and scores the test images once."""
    run = _refit_run(search)
    best = load_config(search.best, stored=True)
    # Without early stopping, because no validation images are left.
    callbacks = [
        callback.model_dump()
        for callback in best.training.callbacks
        if callback.name.lower() != "earlystopping"
    ]
    config = best.with_changes({"data.train_on_validation": True, "training.callbacks": callbacks})
    _log.info("refit    of %s on train and validation", search.best)
    if run.finished:
        summary = run.read_json("summary.json")
    elif (run.path / "config.toml").exists():
        summary = workflow.resume(str(run.path), console=console).summary
    else:
        summary = workflow.fit(config, run=run, console=console).summary
    return {key: summary[key] for key in ("run", "test", "test_images")}


def _refit_run(search: SearchDirectory) -> Run:
    """Returns the run directory for the refit of the best trial.

    Raises:
        InputError: The refit of another trial exists.
    """
    path = search.path / f"refit-{search.ranked()[0].trial}"
    others = [str(other) for other in search.path.glob("refit*") if other != path]
    if others:
        raise InputError(
            f"expected no {', '.join(others)}: a search scores the test images once, and another "
            "trial was refitted; without --refit the same command shows the results"
        )
    return Run(path)


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


@contextlib.contextmanager
def _trial_logs_hidden() -> Iterator[None]:
    """Hides the log lines of trainings from the terminal; log.txt of each run has them."""

    def keep(record: logging.LogRecord) -> bool:
        return record.name.startswith("trainer.tuning") or record.levelno >= logging.WARNING

    handlers = list(logging.getLogger("trainer").handlers)
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)
