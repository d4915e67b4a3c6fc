"""Several workers: configuration, errors, and equality with a training on one device."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from trainer import fit, load_config
from trainer.cluster import Cluster, ClusterDevices
from trainer.devices import read_cluster
from trainer.errors import InputError, MissingError

LOCAL_CLUSTER = Path(__file__).parent.parent / "scripts" / "local_cluster.py"
TWO = ["127.0.0.1:9001", "127.0.0.1:9002"]
# Smooth and without dropout: the results differ by rounding only. 2,401 images are 25 batches. The
# last one has a single image: one of two workers has none.
SETTINGS = {
    "data.name": "synthetic",
    "data.options": "{examples=3335,height=8,width=8,classes=4}",
    "model.name": "mlp",
    "model.options": '{units=[16],activation="tanh",dropout=0.0}',
    "training.batch_size": 100,
    "training.steps_per_execution": 10,
    "training.epochs": 4,
    "training.device": "cpu",
    "training.precision": "float32",
    "logging.name": "trained",
}


def tf_config(addresses: list[str], index: Any = 0, **others: Any) -> str:
    cluster = {"worker": addresses} | others
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


# ---------------------------------------------------------------- configuration


def test_tf_config_names_the_workers_and_the_chief_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert read_cluster() is None
    monkeypatch.setenv("TF_CONFIG", tf_config(TWO, 1))
    cluster = read_cluster()
    assert cluster == Cluster(tuple(TWO), 1)
    assert not cluster.chief
    # As Kubeflow writes it.
    monkeypatch.setenv("TF_CONFIG", tf_config(TWO, 1, chief=["[::1]:2222"]))
    cluster = read_cluster()
    assert cluster == Cluster(("[::1]:2222", *TWO), 2)
    monkeypatch.setenv("TF_CONFIG", tf_config(TWO[:1]))
    assert read_cluster() is None  # one worker trains alone


def test_a_slurm_job_step_names_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    step = {"NUM_TASKS": "3", "NODELIST": "n[01-02]", "TASKS_PER_NODE": "2,1"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", "2")
    expected = Cluster(("n01:8888", "n01:8889", "n02:8888"), 2)
    assert read_cluster() == expected
    monkeypatch.setenv("SLURMD_NODENAME", "n02")
    assert read_cluster() == expected
    monkeypatch.setenv("SLURMD_NODENAME", "n01")
    wrong = "task 2 runs on n01, TensorFlow's resolver: expected .* received n02"
    with pytest.raises(InputError, match=wrong):
        read_cluster()
    for variable, value in [
        ("STEP_NODELIST", "n[01-"),
        ("PROCID", "3"),
        ("PROCID", "x"),
        ("STEP_NUM_TASKS", "x"),
    ]:
        monkeypatch.setenv(f"SLURM_{variable}", value)
        with pytest.raises(InputError, match="SLURM: expected the variables of a job step"):
            read_cluster()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert read_cluster() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"cluster": {}}',
        tf_config(TWO, "0"),
        tf_config(TWO, -1),
        tf_config(TWO, 2),
        tf_config([]),
        tf_config(["no-port", TWO[0]]),
        tf_config(["a:70000", TWO[0]]),
        tf_config([TWO[0], TWO[0]]),
        tf_config(TWO, ps=["a:1"]),
        tf_config(TWO, chief=["a:1", "b:1"]),
    ],
)
def test_wrong_tf_config_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match="TF_CONFIG: expected") as refused:
        read_cluster()
    assert str(refused.value).endswith(f"received {text!r}")


def test_the_command_reports_a_wrong_tf_config_in_one_line(
    command: Callable[..., Any], in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp_path / "empty.toml").touch()
    monkeypatch.setenv("TF_CONFIG", "{")
    code, out, err = command("fit", "empty.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "TF_CONFIG" in err


# ---------------------------------------------------------------- start and loss of workers


def test_workers_wait_for_each_other() -> None:
    """Even if one of them starts late."""
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
    clusters = [Cluster(addresses, index) for index in range(3)]
    everyone = threading.Barrier(3)

    def work(cluster: Cluster) -> None:
        cluster.wait_for_workers(30)
        with cluster._listen():  # as TensorFlow's server
            everyone.wait(30)

    with ThreadPoolExecutor(3) as threads:
        early = [threads.submit(work, each) for each in clusters[:2]]
        time.sleep(0.5)
        assert everyone.n_waiting == 0
        for waiting in (*early, threads.submit(work, clusters[2])):
            assert waiting.result() is None


def test_a_missing_worker_is_named_after_the_time_limit() -> None:
    ours, nobodys = free_ports(2)
    addresses = (f"127.0.0.1:{ours}", f"127.0.0.1:{nobodys}", "there-is-no-such-host.invalid:1")
    with pytest.raises(InputError) as refused:
        Cluster((*addresses, "a..b:1"), 0).wait_for_workers(0.3)
    said = str(refused.value)
    assert said.startswith(
        "cluster: expected every worker within 0.3 s (training.cluster_timeout_seconds), "
        f"missing: task 1 at 127.0.0.1:{nobodys} (Connection refused), "
        "task 2 at there-is-no-such-host.invalid:1 ("
    )
    assert ", task 3 at a..b:1 (" in said


def test_workers_with_different_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: Any = None
    cluster = ClusterDevices(("CPU:0",), alone, Cluster(tuple(TWO), 1))
    sent: list[Any] = []

    def gather(_: ClusterDevices, values: Any) -> Any:
        sent.append(values)
        return np.array([sent[0], values])

    monkeypatch.setattr(ClusterDevices, "all_gather", gather)
    cluster.require_same({"training.seed": 0, "data": "a"})  # this is the chief's
    cluster.require_same({"training.seed": 0, "data": "a"})
    with pytest.raises(InputError, match=r"received different training.seed$"):
        cluster.require_same({"training.seed": 1, "data": "a"})


def test_port_in_use_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        cluster = Cluster((address, "127.0.0.1:1"), 0)
        with pytest.raises(InputError, match=rf"port \d+ of task 0 .*{address}, .*in use"):
            cluster.wait_for_workers(60)


@pytest.mark.slow
def test_workers_that_cannot_agree_end_with_the_traceback_of_the_waiting_line(
    tmp_path: Path,
) -> None:
    """Both have the index 0. TensorFlow would wait without end, and ignore SIGTERM."""
    (tmp_path / "empty.toml").touch()
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    options = changes({"training.device": "cpu", "training.cluster_timeout_seconds": 3})
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", "fit", "empty.toml", *options],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TF_CONFIG": tf_config(order)},
        )
        for order in (addresses, addresses[::-1])
    ]
    for process in processes:
        code, _, err = ended(process)
        assert code != 0
        assert "cluster.py" in err or "missing: task 1" in err, err


def test_errors_about_lost_workers_name_them() -> None:
    import tensorflow as tf

    nobodys, ours = free_ports(2)
    cluster = Cluster((f"127.0.0.1:{nobodys}", f"127.0.0.1:{ours}"), 1)
    error = tf.errors.UnavailableError(None, None, "/job:worker/replica:0/task:0 is gone")
    expected = rf"lost task 0 \(chief\) at 127.0.0.1:{nobodys}: again"
    with pytest.raises(MissingError, match=expected), cluster.watched("again"):
        raise error
    with pytest.raises(ZeroDivisionError), cluster.watched("again"):
        raise ZeroDivisionError


def test_a_worker_that_hangs_is_named() -> None:
    """It still accepts connections: only TensorFlow's message names it."""
    import tensorflow as tf

    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = tuple(f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
    task = "/job:worker/replica:0/task:"
    for said, index, expected in [
        (f"{task}1 unhealthy, debug info: heartbeat timeout", 0, f"task 1 at {addresses[1]}"),
        (f"{task}0 unhealthy, debug info: heartbeat timeout", 2, f"task 0 .* at {addresses[0]}"),
        (f"{task}2 unhealthy (from {task}0)", 1, f"task 0 .* or task 2 at {addresses[2]}"),
        ("CoordinationService does not answer", 2, f"task 0 .* at {addresses[0]}"),
    ]:
        cluster = Cluster(addresses, index)
        error = tf.errors.UnavailableError(None, None, said)
        with pytest.raises(MissingError, match=f"lost {expected}: again"), cluster.watched("again"):
            raise error
    for listener in listeners:
        listener.close()


# ---------------------------------------------------------------- training together


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts `trainer fit` as two workers of a local cluster."""
    (folder / "empty.toml").touch()
    return subprocess.Popen(
        [sys.executable, str(LOCAL_CLUSTER), "2", "--", "fit", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TF_CONFIG"},
    )


def changes(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The runs of the same training in this process (1) and by two workers (2)."""
    folder = tmp_path_factory.mktemp("workers")
    code, out, err = ended(start(folder, "empty.toml", *changes(SETTINGS)))
    assert code == 0, err
    assert out.count("test accuracy") == 1  # only the chief prints it
    (together,) = (folder / "runs").iterdir()
    settings = SETTINGS | {"logging.directory": folder / "alone"}
    config = load_config(
        folder / "empty.toml", [f"{key}={value}" for key, value in settings.items()]
    )
    return {1: fit(config).run.path, 2: together}


def curve(run: Path, tag: str) -> np.ndarray[Any, Any]:
    """Returns the values of a training curve in order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = [
        event
        for path in sorted((run / "train").glob("*.tfevents.*"))
        for event in EventFileLoader(str(path)).Load()
    ]
    values = [value for event in events for value in event.summary.value if value.tag == tag]
    return np.array([float(make_ndarray(value.tensor)) for value in values])


def weights(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(run / "checkpoints" / "final.weights.h5") as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def test_two_workers_train_as_one_device_does(trained: dict[int, Path]) -> None:
    alone, together = (curve(trained[workers], "step/loss") for workers in (1, 2))
    assert len(alone) == len(together) == 100
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    alone, together = (curve(trained[workers], "step/accuracy") for workers in (1, 2))
    ends = [25 * epoch + step - 1 for epoch in range(4) for step in (10, 20, 25)]
    np.testing.assert_allclose(together, alone[ends], rtol=0, atol=1e-5)
    summaries = [json.loads((run / "summary.json").read_text()) for run in trained.values()]
    for split in ("validation", "test"):
        for metric in ("loss", "accuracy"):
            one, two = (summary[split][metric] for summary in summaries)
            assert one == pytest.approx(two, abs=1e-5)
    assert [summary["workers"] for summary in summaries] == [1, 2]
    assert summaries[0]["test"]["accuracy"] > 0.5  # something was learned


def test_two_devices_of_one_machine_train_as_one_does(
    trained: dict[int, Path], in_tmp_path: Path, command: Callable[..., Any]
) -> None:
    (in_tmp_path / "empty.toml").touch()
    settings = changes(SETTINGS | {"training.device": "all"})  # two, see conftest.py
    code, out, err = command("fit", "empty.toml", "--json", *settings)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["devices"] == ["CPU:0", "CPU:1"]
    for tag in ("step/loss", "step/accuracy"):
        alone, together = curve(trained[1], tag), curve(Path(summary["run"]), tag)
        assert len(alone) == len(together) == 100
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_only_the_chief_writes_and_it_records_the_times_of_each_worker(
    trained: dict[int, Path],
) -> None:
    names = [sorted(p.name.split(".tf")[0] for p in run.iterdir()) for run in trained.values()]
    assert names[0] == names[1]
    said = (trained[2] / "log.txt").read_text()
    assert re.search(r"worker   task 0 \(chief\) at 127.0.0.1:\d+, of 2\n", said), said
    for worker in (0, 1):
        assert len(curve(trained[2], f"worker_{worker}/step_ms")) == 11
    assert len(curve(trained[1], "worker_0/step_ms")) == 0


@pytest.mark.slow
def test_a_lost_worker_is_named_and_resume_ends_with_the_same_weights(
    trained: dict[int, Path], tmp_path: Path
) -> None:
    slow = {"training.checkpoint_seconds": 0, "training.steps_per_execution": 1}
    process = start(tmp_path, "empty.toml", *changes(SETTINGS | slow))
    while not list(tmp_path.glob("runs/*/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    worker(process, 1).send_signal(signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 128 + signal.SIGKILL
    assert re.search(
        r"\[0\] trainer: lost task 1 at 127.0.0.1:\d+: start every worker again with "
        r"`trainer fit --resume runs/\S+-trained`",
        err,
    ), err
    assert not list(tmp_path.glob("runs/*/summary.json"))

    before = max(tmp_path.glob("runs/*/checkpoints/step-*"))
    process = start(tmp_path, "--resume", "trained")
    # A signal to one worker stops all of them; their state is saved.
    while max(tmp_path.glob("runs/*/checkpoints/step-*")) <= before:  # until all of them train
        assert process.poll() is None
        time.sleep(0.01)
    worker(process, 1).send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 128 + signal.SIGTERM, err
    (run,) = (tmp_path / "runs").iterdir()
    for index in (0, 1):
        assert (
            f"[{index}] trainer: stopped by SIGTERM; continue with "
            f"`trainer fit --resume runs/{run.name}` on every worker" in err
        )

    code, _, err = ended(start(tmp_path, "--resume", "trained"))
    assert code == 0, err
    expected, found = weights(trained[2]), weights(run)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def worker(process: subprocess.Popen[str], index: int) -> psutil.Process:
    """Returns a worker of a local cluster."""
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "trainer" in child.cmdline()]
    return sorted(workers, key=lambda child: child.create_time())[index]
