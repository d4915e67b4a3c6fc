"""A search by several processes, some of which are killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from trainer.config import Config, load_config
from trainer.errors import InputError, MissingError
from trainer.tuning import search_directory, workers
from trainer.tuning.config import TuningConfig
from trainer.tuning.oracles import make_oracle, quiet
from trainer.tuning.search_directory import SearchDirectory

# Each trial has forty epochs, of some milliseconds each, and a checkpoint after each.
SEARCH = """
[data]
name = "synthetic"
options = { examples = 200, height = 6, width = 6, classes = 3 }
[model]
name = "mlp"
options = { units = [8] }
[training]
epochs = 40
batch_size = 16
device = "cpu"
precision = "float32"
[logging]
name = "s"
tensorboard = false
[tuning]
max_trials = 3
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
    return load_config("s.toml")


def _under_way() -> str | None:
    """Returns a trial that is between its first and its last epoch."""
    for path in sorted(FOLDER.glob("trials/*/metrics.jsonl")):
        if 2 <= len(path.read_text().splitlines()) < 30:
            return path.parent.name
    return None


def _soon(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 90
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def _workers() -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "tune" in child.cmdline():
                found[child.environ()["KERASTUNER_TUNER_ID"]] = child
    return found


def _require_whole(trials: int = 3) -> None:
    """Checks that no trial is lost and none runs twice."""
    records = [json.loads(path.read_text()) for path in FOLDER.glob("records/*.json")]
    assert sorted(record["trial"] for record in records) == [str(i) for i in range(trials)]
    oracle = json.loads((FOLDER / "oracle" / "oracle.json").read_text())
    for order in ("start_order", "end_order"):
        assert sorted(oracle[order]) == [str(i) for i in range(trials)]
    for record in records:
        assert record["status"] == "completed"
        metrics = (FOLDER / record["runs"][0] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in metrics] == list(range(1, 41))


@pytest.mark.slow
def test_a_killed_worker_ends_the_search_and_its_trial_continues(
    search: Config, command: Callable[..., Any]
) -> None:
    assert search.table(TuningConfig).max_trials == 3
    killed = []

    def kill() -> None:
        trial = _soon(_under_way)
        ongoing = json.loads((FOLDER / "oracle" / "oracle.json").read_text())["ongoing_trials"]
        worker = next((name for name, of in ongoing.items() if of == trial), "worker-1")
        _workers()[worker].kill()
        killed.append((worker, trial))

    thread = threading.Thread(target=kill)
    thread.start()
    code, _, err = command("tune", "s.toml", "--workers", "2")
    thread.join()
    worker, trial = killed[0]
    assert code == 3
    assert f"{worker} was killed by SIGKILL during trial {trial}. The search has ended" in err
    assert f"gets the trial (last line of runs/tune-s/logs/{worker}.txt: " in err
    assert not _workers()
    assert not (FOLDER / "records" / f"{trial}.json").exists()

    code, out, err = command("tune", "s.toml", "--workers", "1", "--json")
    assert code == 0, err
    assert len(json.loads(out)["trials"]) == 3
    _require_whole()
    assert "resumed  at epoch" in (FOLDER / "trials" / trial / "log.txt").read_text()


def test_a_worker_ends_without_its_chief_and_loses_nothing(
    search: Config, command: Callable[..., Any]
) -> None:
    directory = SearchDirectory(search)
    directory.create()
    chief = workers.Chief(directory, make_oracle(directory))
    with quiet(), contextlib.ExitStack() as serving:
        port = serving.enter_context(chief.serving("127.0.0.1", 0))
        with chief.workers(1, port):
            trial = _soon(_under_way)
            serving.close()  # a killed chief does not answer
            with pytest.raises(InputError, match="worker-1 of an earlier start"):
                _lock_at_once(directory)
            assert chief.processes["worker-1"].wait(60) == 3
    assert f"the chief at 127.0.0.1:{port} does not answer" in directory.log("worker-1").read_text()

    # That trial has ended, or it was saved. One process continues the search.
    code, _, err = command("tune", "s.toml")
    assert code == 0, err
    _require_whole()
    assert trial in {record.trial for record in directory.records()}


def _lock_at_once(directory: SearchDirectory) -> None:
    """Enters `SearchDirectory.locked` without waiting for workers."""
    wait = search_directory._lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_directory, "_lock", lambda path, _, message: wait(path, 0, message))
        with directory.locked():
            pass


def test_a_signal_saves_the_trial_and_the_message_has_the_next_step(
    search: Config, command: Callable[..., Any]
) -> None:
    def stop() -> None:
        _soon(_under_way)
        os.kill(os.getpid(), signal.SIGTERM)

    assert search.table(TuningConfig).max_trials == 3
    thread = threading.Thread(target=stop)
    thread.start()
    code, _, err = command("tune", "s.toml")
    thread.join()
    assert code == 143
    assert "stopped by SIGTERM; continue with the same `trainer tune` command (runs/tune-s)" in err
    code, _, err = command("tune", "s.toml")
    assert code == 0, err
    _require_whole()
    assert "resumed  at epoch" in "".join(p.read_text() for p in FOLDER.glob("trials/*/log.txt"))


def _chief(config: Config, *names: str, ongoing: str) -> workers.Chief:
    """Returns a chief of some workers, one of which runs trial 7."""
    ongoing_trials = {ongoing: SimpleNamespace(trial_id="7")}
    oracle = SimpleNamespace(tuner_ids=set(names), ongoing_trials=ongoing_trials)
    return workers.Chief(SearchDirectory(config), oracle)


@pytest.mark.parametrize("here", [False, True], ids=["elsewhere", "here"])
def test_a_silent_worker_is_lost(search: Config, here: bool) -> None:
    chief = _chief(search, "near", "far", ongoing="far")
    now = time.monotonic()
    chief.heartbeats.update({"near": now - 50, "far": now - 50})
    killed: list[str] = []
    hangs: Any = SimpleNamespace(poll=lambda: None, kill=lambda: killed.append("far"))
    chief.processes.update({"far": hangs} if here else {})
    chief.require_alive()
    chief.heartbeats["far"] = now - 61
    with pytest.raises(
        MissingError, match=r"^far sent no heartbeat for 61 s during trial 7\. .* gets the trial$"
    ):
        chief.require_alive()
    assert killed == ["far"] * here


def test_a_killed_worker_is_lost(search: Config) -> None:
    chief = _chief(search, "near", ongoing="near")
    with subprocess.Popen(["sleep", "60"]) as process:
        chief.processes["near"] = process
        chief.require_alive()
        process.kill()
        process.wait()
        with pytest.raises(
            MissingError, match=r"^near was killed by SIGKILL during trial 7\. .* gets the trial$"
        ):
            chief.require_alive()


def test_two_searches_do_not_share_a_directory(search: Config, command: Callable[..., Any]) -> None:
    directory = SearchDirectory(search)
    directory.create()
    with directory.locked():
        code, _, err = command("tune", "s.toml")
    assert (code, "runs/tune-s is being searched by another process" in err) == (2, True)


def test_a_chief_without_workers_or_port_ends_with_a_message(
    search: Config,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert search.table(TuningConfig).max_trials == 3
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for variable, value in zip(
            workers._VARIABLES, ("chief", "127.0.0.1", str(port)), strict=True
        ):
            monkeypatch.setenv(variable, value)
        code, _, err = command("tune", "s.toml")
        assert (code, f"cannot listen at 127.0.0.1:{port}: Address already" in err) == (*(2, True),)
        assert "E0000" not in capfd.readouterr().err  # gRPC's own line
    monkeypatch.setattr(workers, "_START_SECONDS", 0.5)
    code, _, err = command("tune", "s.toml")
    assert code == 3
    assert f"chief    at 127.0.0.1:{port}, waiting for workers" in err
    assert (
        f"no worker connected to 127.0.0.1:{port} within 0 s: expected `trainer tune` else" in err
    )
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker")
    code, _, err = command("tune", "s.toml")
    assert (code, f"no chief at 127.0.0.1:{port} within 0 s" in err) == (3, True)


def test_chief_and_workers_find_each_other_by_three_variables(
    search: Config, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert search.table(TuningConfig).max_trials == 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")
    place = ("127.0.0.1", port)

    def start(name: str, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", "tune", "s.toml", *options],
            env={**os.environ, **dict(zip(names, (name, *place), strict=True))},
            stderr=subprocess.PIPE,
            text=True,
        )

    other = start("other", "--set", "tuning.seed=7")
    worker = start("worker-a")
    for variable, value in zip(names, ("chief", *place), strict=True):
        monkeypatch.setenv(variable, value)
    code, _, err = command("tune", "s.toml", "--trials", "2")
    assert code == 0, err
    assert f"chief    at 127.0.0.1:{port}" in err
    _, said = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "tuning.seed = 0 (received 7)" in said
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 0, said
    _require_whole(2)

    assert command("tune", "s.toml", "--workers", "2")[0] == 2
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", "none")
    code, _, err = command("tune", "s.toml")
    assert (code, "expected all of KERASTUNER_TUNER_ID, KERASTUNER_ORACLE_IP" in err) == (2, True)
