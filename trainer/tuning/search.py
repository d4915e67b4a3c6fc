"""`trainer tune`: checks what can be checked, leads the search, says what came of it."""

import contextlib
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import keras
import keras_tuner
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
    make_callbacks,
)
from trainer.files import require_writable, write_text
from trainer.run import Run
from trainer.training.augmentation import make_augmentation
from trainer.training.optimizer import try_optimizer
from trainer.tuning import cluster, hparams, results
from trainer.tuning.config import TuningConfig
from trainer.tuning.folder import Record, SearchFolder, ranked
from trainer.tuning.oracles import Grid, direction_of, make_oracle
from trainer.tuning.space import check_space, decode, extremes, short_names
from trainer.tuning.trial import run_trials

_log = logging.getLogger(__name__)

# So many failures in a row have one cause, a full disk for example: the next would fail, too.
_FAILURES_IN_A_ROW = 5


def tune(
    config: Config,
    *,
    name: str | None = None,
    workers: int = 0,
    refit: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Searches the space of a configuration; goes on with a search that was interrupted.

    Args:
        config: Its `tuning` says what to try and how.
        name: Of the search, which is kept in `<runs>/tune-<name>`; None: the configuration's
            logging.name, else the data set's and the model's.
        workers: Processes that train at the same time; 0: this one alone.
        refit: Train the best on train and validation together, and score the test images once.
        console: Where the refit's progress bar is drawn.

    Returns:
        The content of results.json; None in a process that works for a chief elsewhere.

    Raises:
        InputError: The space does not fit the configuration, or the directory is of another search
            or damaged.
        CheckError: No trial came to an end, or too many failed.
        MissingError: A device of the space is not here, or a worker or the chief is lost.
        StoppedError: A signal came; the state is saved.
    """
    member = cluster.membership()
    if member is not None and workers:
        raise InputError(
            "--workers starts a chief and workers on this machine: expected no KERASTUNER_TUNER_ID"
        )
    if read_cluster() is not None:
        raise InputError(
            "a search gives each of its workers trainings of its own: expected no TF_CONFIG and no "
            "SLURM job step of several tasks, which make one training of all"
        )
    check_space(config)
    require_writable(config.logging.directory)
    default = re.sub(r"[^\w.-]+", "-", f"{config.data.name}-{config.model.name}")
    folder = SearchFolder(config.logging.directory, name or config.logging.name or default)
    advice = f"go on with the same `trainer tune` ({folder.path})"
    if member is not None and not member.chief:
        with _stopped_with(advice):
            cluster.work(folder, config, member)
        return None
    config, metrics = _check_forward(config)
    folder.require_same(config)
    with folder.locked(), _stopped_with(advice):
        folder.create(config)
        hparams.write_domains(folder, config, metrics)
        oracle = make_oracle(config, folder.oracle)
        _require_whole(folder, config, oracle)
        if refit and folder.best.exists():
            _what_to_refit(folder)  # which refuses a second one before more is trained
        _say_what_is_left_out(config, oracle)
        watch = _Watch(folder, config, oracle)
        with watch.timed():
            if member is None and not workers:
                with _terminal_for_the_search():
                    run_trials(folder, config, oracle, "alone", watch.look)
            else:
                cluster.lead(folder, oracle, member, workers, watch.look)
        watch.tell_the_end()
        document = results.write_results(folder, config)
        if refit:
            document["refit"] = _refit(folder, console)
            folder.write_json("results.json", document)
    return document


def _check_forward(config: Config) -> tuple[Config, list[str]]:
    """Builds everything that the space's ends and choices make, before any of it is trained.

    Returns:
        The configuration, with the direction and a fallback of the data set resolved; and the
        names of the validation scores.

    Raises:
        InputError: Something does not fit.
    """
    experiment = build_experiment(config, PhaseTimer())
    metrics = [
        f"val_{name}"
        for name, value in experiment.model.get_metrics_result().items()
        if np.ndim(value) == 0
    ]
    if config.table(TuningConfig).objective not in metrics:
        objective = config.table(TuningConfig).objective
        raise InputError(f"tuning.objective = {objective!r}: {did_you_mean(objective, metrics)}")
    resolved = {
        "tuning.direction": direction_of(config),
        "data.name": experiment.config.data.name,
    }
    config = config.with_changes(resolved)
    built = []
    for named, extreme in extremes(config):
        parts = (extreme.model, extreme.optimizer, extreme.training, extreme.data.augmentation)
        if parts not in built and extreme.data.image_size == config.data.image_size:
            built.append(parts)
            try:
                _build(extreme, experiment)
            except (InputError, MissingError) as error:
                raise type(error)(f"tuning.space, {named}: {error}") from None
    keras.utils.clear_session()
    return config, metrics


def _build(config: Config, experiment: Experiment) -> None:
    """Builds the network, and tries all else that one configuration names."""
    if config.training.batch_size > experiment.data.spec.train:
        raise InputError(
            f"expected batches of {experiment.data.spec.train} training images or fewer, "
            f"received {config.training.batch_size}"
        )
    chosen = devices.select(config.training.device)
    with devices.dtype_policy(devices.choose_precision(config.training.precision, chosen)):
        compiled_model(config, experiment.data.spec)
        make_augmentation(config.data.augmentation, experiment.data)
    make_callbacks(replace(experiment, config=config), Path("run"))
    try_optimizer(config.optimizer)


def _require_whole(folder: SearchFolder, config: Config, oracle: keras_tuner.Oracle) -> None:
    """Refuses a search of which a part is lost: the best would be that of what is left.

    Raises:
        InputError: Records are missing, or are of other values than were chosen.
    """
    records = {record.trial: record for record in folder.records()}
    chosen = {trial: oracle.trials[trial].hyperparameters.values for trial in oracle.trials}
    lost = [trial for trial in oracle.end_order if trial not in records]
    strange = [
        trial
        for trial, record in records.items()
        if trial not in chosen or record.values != decode(config, chosen[trial])
    ]
    for what, trials in (
        ("no record of", lost),
        ("records of other values than its oracle/ chose for", strange),
    ):
        if trials:
            raise InputError(
                f"{folder.path} is damaged: it has {what} trial {', '.join(trials)}: put back what "
                "was there, or choose another --name"
            )


def _say_what_is_left_out(config: Config, oracle: keras_tuner.Oracle) -> None:
    """Says so where a grid has more points than are to be tried."""
    trials = config.table(TuningConfig).max_trials
    if isinstance(oracle, Grid) and any(True for _ in islice(oracle.combinations(), trials, None)):
        _log.warning(
            "The grid has more than tuning.max_trials = %d points: the first of them are tried.",
            trials,
        )


class _Watch:
    """What the process that leads a search does when a trial is done."""

    def __init__(self, folder: SearchFolder, config: Config, oracle: keras_tuner.Oracle) -> None:
        self._folder = folder
        self._config = config
        self._oracle = oracle
        self._told = {record.trial for record in folder.records()}
        self._failures = 0
        self._before, self._begin = folder.seconds(), time.monotonic()
        if self._told:
            done, wanted = len(self._told), config.table(TuningConfig).max_trials
            _log.info("going on with %s: %d of %d trials are done", folder.path, done, wanted)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Notes how long the search has taken, however it ends."""
        self._end_in_time()
        try:
            yield
        finally:
            self._note_seconds()

    def look(self) -> None:
        """Tells of the trials that are done, removes what is not kept, and ends a search in time.

        Raises:
            CheckError: A trial failed, and no more are to be begun.
        """
        ended = [trial for trial in list(self._oracle.end_order) if trial not in self._told]
        for trial in ended:
            self._told.add(trial)
            record = self._folder.record(trial)
            if record is not None:
                self._tell(record)
        if ended:
            tuning = self._config.table(TuningConfig)
            self._folder.keep_best(tuning.keep, tuning.direction)
            results.write_best(self._folder, self._config)
            self._note_seconds()
        self._end_in_time()

    def tell_the_end(self) -> None:
        """Says why there are fewer trials than were wanted, if so."""
        done, tuning = len(self._folder.records()), self._config.table(TuningConfig)
        if done < tuning.max_trials:
            late = tuning.max_seconds is not None and self._elapsed() > tuning.max_seconds
            why = "tuning.max_seconds are over" if late else "the space has no more to try"
            _log.info("%s: %d of %d trials", why, done, tuning.max_trials)

    def _tell(self, record: Record) -> None:
        tuning = self._config.table(TuningConfig)
        names = short_names(tuning.space)
        values = "  ".join(f"{names[key]} {value}" for key, value in record.values.items())
        number = f"trial {record.trial} ({len(self._told)} of {tuning.max_trials})"
        if record.score is None:
            _log.warning("%s failed: %s\n%s", number, record.error, values)
            self._failures += 1
            if tuning.stop_on_failure or self._failures >= _FAILURES_IN_A_ROW:
                what = "it ends" if tuning.stop_on_failure else f"{self._failures} in a row end"
                last = (record.error or "").strip().splitlines()[-1]
                raise CheckError(f"trial {record.trial} failed, and {what} the search: {last}")
            return
        self._failures = 0
        best = ranked(self._folder.records(), tuning.direction)[0]
        _log.info(
            "%s  %s %.5g%s  best %.5g (trial %s)  %s  epochs %d, %.1f s",
            *(number, tuning.objective, record.score),
            *(" pruned" if record.status == "pruned" else "", best.score, best.trial),
            *(values, record.trained_epochs, record.seconds),
        )

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._begin

    def _note_seconds(self) -> None:
        self._folder.write_json("seconds.json", {"seconds": round(self._elapsed(), 1)})

    def _end_in_time(self) -> None:
        limit = self._config.table(TuningConfig).max_seconds
        if limit is not None and self._elapsed() > limit:
            # keras-tuner knows a budget of trials alone: those that were begun are all there are.
            self._oracle.max_trials = max(1, len(self._oracle.trials))


def _refit(folder: SearchFolder, console: Console | None) -> dict[str, Any]:
    """Trains the best on train and validation together; scores the test images once a search."""
    run, config = _what_to_refit(folder)
    write_text(folder.path / "refit.toml", config.to_toml())
    _log.info("refit    of %s on train and validation", folder.best)
    if run.finished:
        summary = run.read_json("summary.json")
    elif (run.path / "config.toml").exists():
        summary = workflow.resume(str(run.path), console=console).summary
    else:
        summary = workflow.fit(config, run=run, console=console).summary
    return {"run": summary["run"], "test": summary["test"], "test_images": summary["test_images"]}


def _what_to_refit(folder: SearchFolder) -> tuple[Run, Config]:
    """Returns where the best is trained again, and how.

    Raises:
        InputError: Something else was trained there.
    """
    best = load_config(folder.best)
    # With every image trained on there is nothing left to stop by.
    callbacks = [
        callback.model_dump()
        for callback in best.training.callbacks
        if callback.name.lower() != "earlystopping"
    ]
    config = best.with_changes({"data.train_on_validation": True, "training.callbacks": callbacks})
    run, noted = Run(folder.path / "refit"), folder.path / "refit.toml"
    if noted.exists() and noted.read_text(encoding="utf-8") != config.to_toml():
        raise InputError(
            f"{run.path} was trained by what was the best before, and the test images are scored "
            "once a search: expected the same best; move it away with refit.toml to score another "
            "(without --refit the same command shows what the search has found)"
        )
    return run, config


@contextlib.contextmanager
def _stopped_with(advice: str) -> Iterator[None]:
    """Says how to go on with the search, where a signal ends it, and not with one of its runs."""
    try:
        yield
    except StoppedError as error:
        raise StoppedError(error.exit_code - 128, advice) from None
    except KeyboardInterrupt:
        raise StoppedError(signal.SIGINT, advice) from None
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM:
            raise
        raise StoppedError(signal.SIGTERM, advice) from None


@contextlib.contextmanager
def _terminal_for_the_search() -> Iterator[None]:
    """Keeps the lines of each training for its own log.txt: the terminal has one a trial."""

    def ours(record: logging.LogRecord) -> bool:
        return record.name.startswith("trainer.tuning") or record.levelno >= logging.WARNING

    handlers = list(logging.getLogger("trainer").handlers)
    filters: Callable[[logging.LogRecord], bool] = ours
    for handler in handlers:
        handler.addFilter(filters)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(filters)
