"""The processes of a search. Each one runs the same loop, and no process leads the others.

They share the state of the search by files. A process locks the search for a moment, restores the
oracle with the results of other processes, and takes a trial. Then it trains this trial and holds
a lock of it. If the process dies, the operating system releases the lock, and another process
continues the trial from its checkpoint.
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
from typing import Any

import filelock
from keras_tuner.engine.trial import TrialStatus

from trainer.errors import CheckError
from trainer.tuning.oracles import make_oracle, quiet
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.trial import run_trial

_log = logging.getLogger(__name__)

_VARIABLE = "TRAINER_TUNE_WORKER"  # set in a process that started_workers() has started
_WAIT_SECONDS = 0.5  # until a process without a trial asks again
_SAVING_SECONDS = 60.0  # for a worker to save its trial
# So many failures in a row have a common cause, for example a full disk.
_MAX_FAILURES_IN_A_ROW = 5


class Worker:
    """The part of this process in a search: it takes trials, trains them and logs the results."""

    def __init__(self, search: SearchDirectory) -> None:
        """Starts the clock of this process, which continues the time of the search."""
        self._search = search
        self._earlier = search.records().keys()
        with search.lock, quiet():
            self._start = time.monotonic() - make_oracle(search).seconds

    def run(self) -> Any:
        """Runs trials until this process and all others have finished.

        Returns:
            The oracle at the end of the search.

        Raises:
            CheckError: Trials failed, and the search must end.
            StoppedError: A signal stopped the training; the state is saved.
        """
        try:
            while self._run_next():
                pass
        finally:
            with self._oracle() as oracle:
                oracle.save()  # which notes the time of the search
        return oracle

    def _run_next(self) -> bool:
        """Runs one trial, or waits for other processes; returns False after the last trial."""
        with self._oracle() as oracle:
            self._check_failures(oracle.end_order)
            taken = self._take(oracle)
        if taken is None:
            waiting = bool(oracle.ongoing_trials)  # of other processes
            time.sleep(_WAIT_SECONDS if waiting else 0)
            return waiting
        trial, lock = taken
        with lock, _trial_logs_hidden():
            record = run_trial(self._search, trial.trial_id, trial.hyperparameters.values)
        with self._search.lock:
            self._search.remove_weights()
            self._search.write_best()
        self._log_result(record)
        return True

    @contextlib.contextmanager
    def _oracle(self) -> Iterator[Any]:
        """Locks the search, and restores its oracle with the results of all processes."""
        with self._search.lock, quiet():
            oracle = make_oracle(self._search)
            # Other processes may search at the same time: the longest time counts.
            oracle.seconds = max(oracle.seconds, time.monotonic() - self._start)
            yield oracle

    def _take(self, oracle: Any) -> tuple[Any, Any] | None:
        """Returns a trial and its lock: one that lost its process, else a new one, or None."""
        for trial in oracle.ongoing_trials.values():
            with contextlib.suppress(filelock.Timeout):
                return trial, self._search.trial_lock(trial.trial_id).acquire(timeout=0)
        if oracle.late and oracle.trials:
            return None
        trial = oracle.create_trial("")  # saves the state
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
        score = f"{tuning.objective} {record.score:.5g} {record.status}"
        end = f"epochs {record.trained_epochs}, {record.seconds:.1f} s"
        best_score = f"best {best.score:.5g} (trial {best.trial})"
        _log.info("%s  %s  %s  %s  %s", title, score, best_score, values, end)


@contextlib.contextmanager
def started_workers(search: SearchDirectory, count: int) -> Iterator[None]:
    """Starts processes that run the same search, and waits for their end.

    After an error, it stops them; they save their trials.
    """
    command = [sys.executable, "-m", "trainer", "tune", str(search.config_file)]
    command += ["--name", search.name]
    variables = {_VARIABLE: "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end stops the worker if this process is killed
                stdout=subprocess.DEVNULL,
                env={**os.environ, **variables},
                process_group=0,  # only this process receives control-C; it stops the others
            )
            processes.append(process)
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            with process:  # closes the pipe
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SAVING_SECONDS)
                process.kill()
            if process.returncode == -signal.SIGKILL:  # else the worker has printed a line
                _log.warning("A worker was killed. Another process continued its trial.")


def stop_with_parent() -> bool:
    """Returns whether another process has started this worker; if so, this one stops with it."""
    if _VARIABLE not in os.environ:
        return False

    def wait_for_end() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the parent has ended
        os.kill(os.getpid(), signal.SIGTERM)  # the training saves its state

    threading.Thread(target=wait_for_end, daemon=True).start()
    return True


@contextlib.contextmanager
def _trial_logs_hidden() -> Iterator[None]:
    """Shows only warnings of trainings on the terminal; log.txt of each run has all lines."""
    levels = {handler: handler.level for handler in logging.getLogger("trainer").handlers}
    for handler in levels:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)
