"""Kills a training with SIGKILL at random moments, resumes it, and compares the final results.

    python scripts/kill_and_resume.py --kills 50
    python scripts/kill_and_resume.py --kills 20 --workers 2

The same training runs twice, with dropout, augmentation and callbacks that have a state: once
without interruption, and once killed repeatedly. At the end, weights, scores, metrics.jsonl, the
CSV file of a Keras callback and every point in TensorBoard must be equal, bit for bit, except
measured times. If they are not, the script prints the differences and exits with 1. With several
workers, a random worker of a local cluster is killed, and the others must exit by themselves. Then
the mean loss and metrics of an interrupted epoch may differ in the last digit, because they are
sums of the parts of all workers.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import psutil
import typer

_CLUSTER = Path(__file__).with_name("local_cluster.py")
_KILLED = (-9, 128 + 9)  # exit codes of Python and of a shell
_LAYERS = (
    '[{name="Conv2D",options={filters=8,kernel_size=3,strides=2,activation="relu"}},'
    '{name="BatchNormalization"},{name="Flatten"},{name="Dropout",options={rate=0.5}}]'
)
_CALLBACKS = (
    '[{name="EarlyStopping",options={patience=1000,restore_best_weights=true}},'
    '{name="ReduceLROnPlateau",options={patience=3,factor=0.9}},'
    '{name="CSVLogger",options={filename="{run}/epochs.csv"}}]'
)
_SETTINGS = {
    "data.name": "synthetic",
    "data.options.examples": 2000,
    "data.augmentation": '[{name="RandomRotation",options={factor=0.1}}]',
    "model.name": "layers",
    "model.options": f"{{layers={_LAYERS}}}",
    "training.batch_size": 16,
    "training.steps_per_execution": 20,
    "training.checkpoint_seconds": 0,
    "training.callbacks": _CALLBACKS,
}
_TIMES = ("step_ms", "step_ms_quartiles", "images_per_second", "windows")


def main(
    *,
    kills: Annotated[int, typer.Option(min=1)] = 50,
    epochs: Annotated[int | None, typer.Option(help="Default: enough for all kills")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers of a local cluster")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed of the moments")] = 0,
) -> None:
    """Runs both trainings and compares them."""
    epochs = epochs or 4 + 4 * kills
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        for each in (undisturbed, killed):
            each.mkdir()
            (each / "empty.toml").touch()
        process = _start(undisturbed, epochs, workers)
        done = _kill_and_resume(killed, epochs, workers, kills, random.Random(seed))
        if process.wait() != 0:
            sys.exit("the undisturbed training failed")
        runs = [next((each / "runs").iterdir()) for each in (undisturbed, killed)]
        differences = _compare(*runs, tolerance=0 if workers == 1 else 1e-6)
    for difference in differences:
        print(f"differs: {difference}")
    print(
        f"{done} kills in {epochs} epochs: "
        + ("NOT equal" if differences else "weights, metrics, logs and curves are equal")
    )
    raise typer.Exit(1 if differences or done < kills else 0)


def _start(
    folder: Path, epochs: int, workers: int, run: Path | None = None
) -> subprocess.Popen[str]:
    """Starts a training in a folder, or resumes a run."""
    cluster = [str(_CLUSTER), str(workers), "--"]
    command = [sys.executable, *(["-m", "trainer"] if workers == 1 else cluster), "fit"]
    if run is None:
        command += ["empty.toml", "--deterministic", "--epochs", str(epochs)]
        for key, value in _SETTINGS.items():
            command += ["--set", f"{key}={value}"]
    else:
        command += ["--resume", str(run)]
    return subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def _kill_and_resume(
    folder: Path, epochs: int, workers: int, kills: int, moments: random.Random
) -> int:
    """Kills the training a number of times, then lets it finish; returns the number of kills."""
    done = 0
    while True:
        run = next((path.parent for path in folder.glob("runs/*/config.toml")), None)
        process = _start(folder, epochs, workers, run)
        if done < kills:
            _wait_for_a_moment(process, folder, moments)
            if not _has_trained(folder, epochs):  # a finished run cannot be resumed
                _kill(process, workers, moments)
        _, errors = process.communicate()
        if process.returncode == 0:
            return done
        if process.returncode not in _KILLED:
            sys.exit(f"resuming failed after {done} kills:\n{errors}")
        done += 1
        print(f"kill {done}: newest checkpoint {_newest(folder)}", flush=True)


def _wait_for_a_moment(
    process: subprocess.Popen[str], folder: Path, moments: random.Random
) -> None:
    """Waits for a random moment: usually during training, sometimes during the start."""
    before = _newest(folder)
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0, 6))
    else:
        while process.poll() is None and _newest(folder) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))


def _has_trained(folder: Path, epochs: int) -> bool:
    """Returns whether the last epoch is finished and only scores and reports are left."""
    lines = (path.read_text().splitlines() for path in folder.glob("runs/*/metrics.jsonl"))
    return any(len(each) >= epochs for each in lines)


def _kill(process: subprocess.Popen[str], workers: int, moments: random.Random) -> None:
    """Kills a process, or one of its workers."""
    if workers == 1:
        process.kill()
        return
    while process.poll() is None and len(_workers(process)) < workers:
        time.sleep(0.01)
    if process.poll() is None:
        moments.choice(_workers(process)).kill()


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns the workers of a local cluster, in order."""
    children = psutil.Process(process.pid).children()
    return sorted((c for c in children if "trainer" in c.cmdline()), key=lambda c: c.create_time())


def _newest(folder: Path) -> str | None:
    return max((path.name for path in folder.glob("runs/*/checkpoints/step-*")), default=None)


def _compare(undisturbed: Path, killed: Path, *, tolerance: float) -> list[str]:
    """Returns the differences of two finished runs; weights must be equal to the last bit."""
    differences = []
    for name in ("final.weights.h5", "best.weights.h5"):
        files = [_datasets(run / "checkpoints" / name) for run in (undisturbed, killed)]
        same = files[0].keys() == files[1].keys() and all(
            np.array_equal(files[0][key], files[1][key]) for key in files[0]
        )
        if not same:
            differences.append(name)
    for name, read in (
        ("metrics.jsonl", _metrics),
        ("epochs.csv", lambda run: np.genfromtxt(run / "epochs.csv", delimiter=",").tolist()),
        ("summary.json", _scores),
        ("TensorBoard", _points),
    ):
        one, other = read(undisturbed), read(killed)
        if isinstance(one, dict):
            keys = [k for k in {**one, **other} if not _same(one.get(k), other.get(k), tolerance)]
            differences += [f"{name}, {key}: {one.get(key)}, {other.get(key)}" for key in keys]
        elif not _same(one, other, tolerance):
            differences.append(name)
    return differences


def _same(one: Any, other: Any, tolerance: float) -> bool:
    """Compares JSON values; numbers may differ by a relative tolerance, nothing else may."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() == other.keys()
        return keys and all(_same(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(a, b, tolerance) for a, b in pairs)
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True))
    return bool(one == other)


def _datasets(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in lines]


def _scores(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    return {key: summary[key] for key in ("test", "validation", "epochs", "steps")}


def _points(run: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Returns every point of the TensorBoard files, in order."""
    import tensorflow as tf

    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path in sorted(run.rglob("*.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                array = tf.make_ndarray(value.tensor)
                timed = value.tag.rpartition("/")[2] in _TIMES
                if array.shape == () and not timed and array.dtype != object:
                    key = (str(path.parent.relative_to(run)), value.tag)
                    points.setdefault(key, []).append((event.step, float(array)))
    return points


if __name__ == "__main__":
    typer.run(main)
