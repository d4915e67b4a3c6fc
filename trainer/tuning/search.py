"""`trainer tune`: checks the configuration, runs the search, writes the results.

Each process of a search runs the same loop, and none leads the others. They share the state of the
search by files. A process locks the search for a moment, restores the oracle with the results of
other processes, and takes a trial. Then it trains this trial and holds a lock of it. If the process
dies, the operating system releases the lock, and another process continues the trial from its
checkpoint.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import keras
import numpy as np
from keras_tuner.engine.trial import TrialStatus
from rich.console import Console

from trainer import devices
from trainer.config import Config
from trainer.config_file import load_config
from trainer.errors import CheckError, InputError, StoppedError, did_you_mean, expect
from trainer.experiment import PhaseTimer, build_experiment
from trainer.training.user_callbacks import make_callbacks
from trainer.tuning.config import TuningConfig, check_extremes, check_space, direction_of
from trainer.tuning.oracles import restored_oracle
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.trial import run_trial, train_or_resume

_log = logging.getLogger(__name__)

_VARIABLE = "TRAINER_TUNE_WORKER"  # set in a process that _started_workers() has started
_WAIT_SECONDS = 0.5  # until a process without a trial asks again
# So many failures in a row have a common cause, for example a full disk.
_MAX_FAILURES_IN_A_ROW = 5


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
        InputError: The space cannot be searched, or the directory belongs to another search.
        CheckError: No trial has a score, or too many failed.
        MissingError, StoppedError: As `trainer.fit`.
    """
    single = "no TF_CONFIG and no SLURM job step of several tasks"
    expect(devices.read_cluster() is None, "each process of a search trains alone", single, "one")
    check_space(config)
    search, is_worker = SearchDirectory(config, name), _stop_with_parent()
    if not is_worker:
        search = SearchDirectory(_resolved(config), search.name)
        if not search.config_file.exists():  # a continued search was checked before
            check_extremes(search.config, _build)
    try:
        if is_worker:
            Worker(search).run()
            return None
        search.create()
        with _started_workers(search, workers - 1):
            Worker(search).run()
        done, limit = len(search.records()), search.tuning.max_trials
        if done < limit:
            _log.info("%d of %d trials: the space or tuning.max_seconds is used up", done, limit)
        if refit and search.ranked():
            with search.trial_lock("refit"):  # other processes wait
                _refit(search, console)
        with search.lock:
            return search.write_results()
    except StoppedError as stop:  # its advice is about a run of the search
        advice = f"continue with the same `trainer tune` command ({search.path})"
        raise StoppedError(stop.exit_code - 128, advice) from None
    except OSError as error:
        raise InputError(f"{search.path} cannot be written: {error}") from None


def _resolved(config: Config) -> Config:
    """Checks the objective; resolves the direction and a fallback of the data set."""
    experiment, tuning = build_experiment(config, PhaseTimer()), config.table(TuningConfig)
    found = experiment.model.get_metrics_result().items()
    metrics = [f"val_{name}" for name, value in found if np.ndim(value) == 0]
    known = f"a metric of the validation ({did_you_mean(tuning.objective, metrics)})"
    expect(tuning.objective in metrics, "tuning.objective", known, tuning.objective)
    data = experiment.config.data.name
    return config.with_changes({"tuning.direction": direction_of(tuning), "data.name": data})


def _build(config: Config) -> None:
    """Builds all objects of a configuration, before any other is trained."""
    experiment = build_experiment(config, PhaseTimer())
    experiment.batches("train", shuffled=True)
    make_callbacks(config, experiment.model, Path("run"))
    keras.utils.clear_session()


def _refit(search: SearchDirectory, console: Console | None) -> None:
    """Trains the best trial on train and validation together, and scores the test images once."""
    run, best = search.refit_run(), load_config(search.best, stored=True)
    others = [str(path) for path in search.path.glob("refit-*") if path != run.path]
    expect(not others, "--refit scores the test images", "one refit per search", others)
    # Without early stopping, because no validation images are left.
    callbacks = [each for each in best.training.callbacks if each.name.lower() != "earlystopping"]
    config = best.with_changes({"data.train_on_validation": True, "training.callbacks": callbacks})
    _log.info("refit    of %s on train and validation", search.best)
    train_or_resume(run, config, console=console)


class Worker:
    """The part of this process in a search: it takes trials, trains them and logs the results."""

    def __init__(self, search: SearchDirectory) -> None:
        """Starts the clock of this process."""
        self._search, self._start = search, time.monotonic()
        with restored_oracle(search):  # refuses a damaged directory
            self._earlier = search.records().keys()

    def run(self) -> None:
        """Runs trials until all processes have finished."""
        while self._run_next():
            pass
        with self._search.lock:
            self._search.write_best()

    def _run_next(self) -> bool:
        """Runs one trial, or waits for other processes; returns False after the last trial."""
        with restored_oracle(self._search) as oracle:
            self._check_failures(oracle.end_order)
            taken = self._take(oracle)
        if taken is None:
            waiting = bool(oracle.ongoing_trials)  # of other processes
            time.sleep(_WAIT_SECONDS if waiting else 0)
            return waiting
        trial, lock = taken
        with lock:
            record = run_trial(self._search, trial.trial_id, trial.hyperparameters.values)
        with self._search.lock:
            self._search.remove_weights()
            self._search.write_best()
        self._log_result(record)
        return True

    def _take(self, oracle: Any) -> tuple[Any, Any] | None:
        """Returns a trial and its lock: one that lost its process, else a new one, or None."""
        for trial in oracle.ongoing_trials.values():
            with contextlib.suppress(filelock.Timeout):
                return trial, self._search.trial_lock(trial.trial_id).acquire(timeout=0)
        limit, seconds = self._search.tuning.max_seconds, time.monotonic() - self._start
        if limit is not None and seconds > limit and oracle.trials:
            return None
        trial = oracle.create_trial("")
        running = trial.status == TrialStatus.RUNNING
        return (trial, self._search.trial_lock(trial.trial_id).acquire()) if running else None

    def _check_failures(self, ended: list[str]) -> None:
        """Raises CheckError if too many trials failed in a row since this process started."""
        limit = 1 if self._search.tuning.stop_on_failure else _MAX_FAILURES_IN_A_ROW
        records, failures = self._search.records(), 0
        for record in (records[trial] for trial in ended if trial not in self._earlier):
            failures = failures + 1 if record.score is None else 0
            if failures == limit:
                last = (record.error or "").strip().splitlines()[-1]
                raise CheckError(f"the search ends after {limit} failed trials in a row: {last}")

    def _log_result(self, record: TrialRecord) -> None:
        tuning, count = self._search.tuning, len(self._search.records())
        values = "  ".join(f"{key} {value}" for key, value in record.values.items())
        title = f"trial {record.trial} ({count} of {tuning.max_trials})"
        if record.score is None:
            _log.warning("%s failed: %s\n%s", title, record.error, values)
            return
        best = self._search.ranked()[0]
        scores = f"{record.score:.5g} {record.status}  best {best.score:.5g} (trial {best.trial})"
        end = f"epochs {record.trained_epochs}, {record.seconds:.1f} s"
        _log.info("%s  %s %s  %s  %s", title, tuning.objective, scores, values, end)


@contextlib.contextmanager
def _started_workers(search: SearchDirectory, count: int) -> Iterator[None]:
    """Starts processes that run the same search, and waits for them; an error here stops them."""
    command = [sys.executable, "-m", "trainer", "tune", str(search.config_file)]
    command += ["--name", search.name]
    variables = {_VARIABLE: "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # its end stops the worker if this process is killed
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **variables},
                    process_group=0,  # only this process receives control-C; it stops the others
                )
            )
            for _ in range(count)
        ]
        try:
            yield
            if -signal.SIGKILL in [process.wait() for process in processes]:
                _log.warning("A worker was killed. Another process continued its trial.")
        except BaseException:
            for process in processes:
                process.terminate()
            raise


def _stop_with_parent() -> bool:
    """Returns whether another process has started this worker; if so, this one stops with it."""

    def wait_for_end() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the parent has ended
        os.kill(os.getpid(), signal.SIGTERM)  # the training saves its state

    if _VARIABLE in os.environ:
        threading.Thread(target=wait_for_end, daemon=True).start()
    return _VARIABLE in os.environ
