"""A search by several processes, some of which are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.config import Config
from trainer.config_file import load_config
from trainer.tuning.config import TuningConfig
from trainer.tuning.oracles import restored_oracle
from trainer.tuning.search import Worker
from trainer.tuning.search_directory import SearchDirectory

# A trial takes at least six seconds: long enough for other processes to start.
SLOW = """
import time

import keras

class Slow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        time.sleep(0.15)
"""
SEARCH = """
[data]
name = "synthetic"
options = { examples = 200, height = 6, width = 6, classes = 3 }
[model]
name = "mlp"
options = { units = [8] }
[training]
epochs = 40
callbacks = ["slow:Slow"]
batch_size = 16
device = "cpu"
precision = "float32"
[logging]
name = "s"
tensorboard = false
[tuning]
max_trials = 4
patience = 0
pruning = false
direction = "max"
[tuning.space]
optimizer.learning_rate = { low = 0.001, high = 0.1, scale = "log" }
"""
FOLDER = Path("runs/tune-s")


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The search above, in s.toml."""
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text(SEARCH)
    Path("slow.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    return load_config("s.toml")


def _epochs(trial: str) -> int:
    """Returns the number of epochs that a trial has trained."""
    metrics = FOLDER / "trials" / trial / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def _under_way(trials: int = 1) -> list[str]:
    """Returns the trials between their first and last epoch, if there are enough of them."""
    names = [path.parent.name for path in FOLDER.glob("trials/*/metrics.jsonl")]
    found = [name for name in sorted(names) if 2 <= _epochs(name) < 30]
    return found if len(found) >= trials else []


def _soon(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def _start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "tune", "s.toml", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns the processes that a search has started."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):
            if "tune" in child.cmdline():
                found.append(child)
    return found


def _require_whole(trials: int = 4) -> None:
    """Checks that no trial is lost and none runs twice."""
    records = [json.loads(path.read_text()) for path in FOLDER.glob("records/*.json")]
    names = [str(number) for number in range(trials)]
    assert sorted(record["trial"] for record in records) == names
    oracle = json.loads((FOLDER / "oracle" / "oracle.json").read_text())
    for order in ("start_order", "end_order"):
        assert sorted(oracle[order]) == names
    for record in records:
        assert record["status"] == "completed"
        metrics = (FOLDER / record["runs"][0] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in metrics] == list(range(1, 41))
    assert len(json.loads((FOLDER / "results.json").read_text())["trials"]) == trials


def _logs() -> str:
    return "".join(path.read_text() for path in FOLDER.glob("trials/*/log.txt"))


@pytest.mark.slow
def test_another_process_continues_the_trial_of_a_killed_worker(search: Config) -> None:
    assert search.table(TuningConfig).max_trials == 4
    process = _start("--workers", "2", "--json")
    _soon(lambda: _under_way(2))
    (worker,) = _workers(process)
    worker.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "A worker was killed. Another process continued its trial." in err
    assert [err.count(f"trial {trial} (") for trial in range(4)] == [1] * 4  # by each process
    assert len(json.loads(out)["trials"]) == 4
    _require_whole()
    assert _logs().count("resumed  epoch") == 1


@pytest.mark.slow
def test_workers_stop_with_the_killed_process_that_started_them(
    search: Config, command: Callable[..., Any]
) -> None:
    process = _start("--workers", "2")
    _soon(lambda: _under_way(2))
    process.kill()
    _, err = process.communicate(timeout=60)  # waits for both processes: they share stderr
    assert "stopped by SIGTERM; continue with the same `trainer tune` command" in err
    directory = SearchDirectory(search)
    before = directory.records()
    code, _, err = command("tune", "s.toml")  # with another number of workers
    assert code == 0, err
    _require_whole()
    assert len(before) < 4
    assert _logs().count("resumed  epoch") >= 1


@pytest.mark.slow
def test_the_same_command_in_several_places_shares_one_search(
    search: Config, command: Callable[..., Any]
) -> None:
    assert search.table(TuningConfig).max_trials == 4
    others = [_start("--json") for _ in range(2)]
    _soon(lambda: _under_way(2))
    others[0].kill()
    code, out, err = command("tune", "s.toml", "--json")
    assert code == 0, err
    others[0].communicate()
    other, err = others[1].communicate(timeout=120)
    assert others[1].returncode == 0, err
    _require_whole()
    first, second = json.loads(out), json.loads(other)
    assert first["trials"] == second["trials"]
    assert first["best"] == second["best"]


def test_a_signal_saves_the_trial_and_the_message_has_the_next_step(
    search: Config, command: Callable[..., Any]
) -> None:
    def stop() -> None:
        _soon(_under_way)
        os.kill(os.getpid(), signal.SIGTERM)

    assert search.table(TuningConfig).max_trials == 4
    thread = threading.Thread(target=stop)
    thread.start()
    code, _, err = command("tune", "s.toml", "--trials", "1")
    thread.join()
    assert code == 143
    assert "stopped by SIGTERM; continue with the same `trainer tune` command (runs/tune-s)" in err
    code, _, err = command("tune", "s.toml", "--trials", "1")
    assert code == 0, err
    _require_whole(1)
    assert "resumed  epoch" in _logs()


@pytest.mark.slow
def test_control_c_stops_all_workers_which_save_their_trials(
    search: Config, command: Callable[..., Any]
) -> None:
    assert search.table(TuningConfig).max_trials == 4
    process = _start("--workers", "2")
    _soon(lambda: _under_way(2))
    (worker,) = _workers(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by control-C; continue with the same `trainer tune` command" in err
    assert not worker.is_running()
    code, _, err = command("tune", "s.toml")
    assert code == 0, err
    _require_whole()
    assert _logs().count("resumed  epoch") == 2


def test_a_trial_that_a_process_holds_is_waited_for(search: Config) -> None:
    short = {"tuning.max_trials": 1, "training.epochs": 1, "training.callbacks": []}
    directory = SearchDirectory(search.with_changes(short))
    directory.create()
    first, second = Worker(directory), Worker(directory)
    with restored_oracle(directory) as oracle:
        taken = first._take(oracle)
        assert taken is not None
        trial, lock = taken
    assert second._run_next()  # waits
    assert not directory.records()
    lock.lock.release()  # as when the process dies
    assert second._run_next()  # trains it
    assert not second._run_next()
    assert [*directory.records()] == [trial.trial_id]


def test_no_trial_starts_after_the_time_of_the_command(
    search: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    directory = SearchDirectory(search.with_changes({"tuning.max_seconds": 10.0}))
    directory.create()

    def take(worker: Worker) -> Any:
        with restored_oracle(directory) as oracle:
            return worker._take(oracle)

    first = Worker(directory)
    now += 11
    held = [take(first)]  # one trial at least
    held.append(take(first))
    now += 500
    held.append(take(Worker(directory)))
    assert [trial is None for trial in held] == [False, True, False]
