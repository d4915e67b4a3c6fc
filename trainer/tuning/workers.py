"""The processes of a search. Each one runs the same loop, and no process leads the others.

They share the state of the search by files. A process locks the search for a moment, restores the
oracle, adds the results of other processes to it, and takes a trial. Then it trains this trial and
holds a lock of it. If the process dies, the operating system releases the lock, and another process
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
from itertools import islice
from typing import Any

import filelock
from keras_tuner.engine.trial import TrialStatus

from trainer.errors import CheckError
from trainer.tuning import results
from trainer.tuning.oracles import combinations, make_oracle, quiet
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.space import short_names
from trainer.tuning.trial import run_trial

_log = logging.getLogger(__name__)

_VARIABLE = "TRAINER_TUNE_WORKER"  # set in a process that started_workers() has started
_WAIT_SECONDS = 0.5  # until a process without a trial asks again
_SAVING_SECONDS = 60.0  # for a worker to save its trial
# So many failures in a row have a common cause, for example a full disk.
_MAX_FAILURES_IN_A_ROW = 5


class Worker:
    """The part of this process in a search: it takes trials, trains them and reports results."""

    def __init__(self, search: SearchDirectory) -> None:
        """Starts the clock of this process."""
        self._search = search
        self._tuning = search.tuning
        self._start = time.monotonic()
        self._seconds_before: float | None = None
        self._reported = {record.trial for record in search.records()}
        self._failures = 0
        done, limit = len(self._reported), self._tuning.max_trials
        if done:
            _log.info("continuing %s: %d of %d trials are done", search.path, done, limit)
        beyond = islice(combinations(self._tuning), limit, None)
        if self._tuning.algorithm == "grid" and next(beyond, None) is not None:
            _log.warning("the grid has more points than tuning.max_trials = %d", limit)

    def run(self) -> float:
        """Runs trials until this process and all others have finished.

        Returns:
            The time of the search in seconds.

        Raises:
            CheckError: Trials failed, and the search must end.
            StoppedError: A signal stopped the training; the state is saved.
        """
        try:
            with _trial_logs_hidden():
                while (seconds := self._run_next()) is None:
                    pass
        finally:
            with self._oracle() as oracle:
                oracle.save()  # which notes the time of the search
        return seconds

    def _run_next(self) -> float | None:
        """Runs one trial, or waits for other processes; returns the time after the last trial."""
        with self._oracle() as oracle:
            self._report(oracle)
            taken = self._take(oracle)
            if taken is None and not oracle.ongoing_trials:
                self._report_end(oracle)
                return float(oracle.seconds)
        if taken is None:  # trials of other processes are missing
            time.sleep(_WAIT_SECONDS)
            return None
        trial, lock = taken
        with lock:
            run_trial(self._search, trial.trial_id, trial.hyperparameters.values)
        return None

    @contextlib.contextmanager
    def _oracle(self) -> Iterator[Any]:
        """Locks the search, and restores its oracle with the results of all processes."""
        with self._search.locked(), quiet():
            oracle = make_oracle(self._search)
            if self._seconds_before is None:
                self._seconds_before = oracle.seconds
            # Other processes may search at the same time: the longest time counts.
            elapsed = time.monotonic() - self._start
            oracle.seconds = max(oracle.seconds, self._seconds_before + elapsed)
            oracle.add_records()
            yield oracle

    def _take(self, oracle: Any) -> tuple[Any, Any] | None:
        """Returns a trial and its lock: one that lost its process, else a new one, or None."""
        for trial in oracle.ongoing_trials.values():
            with contextlib.suppress(filelock.Timeout):
                return trial, self._search.trial_lock(trial.trial_id).acquire(timeout=0)
        trial = oracle.create_trial("")  # saves the state
        if trial.status != TrialStatus.RUNNING:
            return None
        return trial, self._search.trial_lock(trial.trial_id).acquire()

    def _report(self, oracle: Any) -> None:
        """Reports trials that ended since the last call, and removes weights that are not kept.

        Raises:
            CheckError: A trial failed, and the search must end.
        """
        ended = [trial for trial in oracle.end_order if trial not in self._reported]
        for trial in ended:
            self._reported.add(trial)
            self._report_trial(self._search.record(trial))
        if ended:
            self._search.remove_weights()
            results.write_best(self._search)

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

    def _report_end(self, oracle: Any) -> None:
        """Logs the reason if the search ends with fewer trials than configured."""
        done, limit = len(oracle.end_order), self._tuning.max_trials
        if done < limit:
            reason = "the space has no more values"
            reason = "tuning.max_seconds is used up" if oracle.late else reason
            _log.info("%s: %d of %d trials", reason, done, limit)


@contextlib.contextmanager
def started_workers(search: SearchDirectory, count: int) -> Iterator[None]:
    """Starts processes that run the same search. At the end, stops them; they save their trials."""
    command = [sys.executable, "-m", "trainer", "tune", str(search.config_file)]
    command += ["--name", search.name]
    processes: dict[str, subprocess.Popen[bytes]] = {}
    stopping = threading.Event()
    try:
        for name in (f"worker-{number}" for number in range(1, count + 1)):
            variables = {_VARIABLE: name, "PYTHONPATH": os.pathsep.join(sys.path)}
            with (search.logs / f"{name}.txt").open("ab") as log:
                processes[name] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # its end stops the worker if this process is killed
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **variables},
                    process_group=0,  # only this process receives control-C; it stops the others
                )
            watch = (search, name, processes[name], stopping)
            threading.Thread(target=_report_loss, args=watch, daemon=True).start()
        yield
    finally:
        stopping.set()
        for process in processes.values():
            process.terminate()
        deadline = time.monotonic() + _SAVING_SECONDS
        for process in processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _report_loss(
    search: SearchDirectory, name: str, process: subprocess.Popen[bytes], stopping: threading.Event
) -> None:
    """Waits for the end of a worker, and logs a warning if the worker did not finish."""
    code = process.wait()
    if code == 0 or stopping.is_set():
        return
    reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    lines = (search.logs / f"{name}.txt").read_text("utf-8", "replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "empty")
    _log.warning(
        "%s %s. Another process continues its trial (last line of %s: %s)",
        *(name, reason, search.logs / f"{name}.txt", last),
    )


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
