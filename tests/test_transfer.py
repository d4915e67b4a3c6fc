"""Transfer learning by the command line, as docs/transfer.md describes it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import applications
import h5py
import keras
import numpy as np
import pictures
import pytest

from trainer.experiment import restore
from trainer.run import Run, open_run

CONFIG = Path(__file__).parents[1] / "configs" / "transfer.toml"
SMALL = ["--set", "data.image_size=[32, 32]", "--set", "training.batch_size=8"]
SMALL += ["--set", "logging.tensorboard=false", "--set", "training.precision=float32"]
HEAD = [*SMALL, "--set", "model.options.weights=no_top.h5", "--name", "head"]
TUNED = [*SMALL, "--set", "training.init_from=head", "--set", "model.freeze=[]", "--name", "tuned"]
# The ImageNet weights of the configuration are not loaded: the weights of the first run are.
TUNED += ["--set", "optimizer.learning_rate=1e-4"]


def weights(run: Run) -> dict[str, list[Any]]:
    """Returns the final weights of the application by layer."""
    network = restore(run).get_layer("mobilenetv2")
    return {layer.name: layer.get_weights() for layer in network.layers if layer.weights}


def optimizer_variables(run: Run) -> int:
    with h5py.File(run.weights) as file:
        return len(file["optimizer/vars"])


def check_restored(run: Run, command: Callable[..., Any]) -> None:
    """Every verb that restores a run works."""
    commands: list[list[Any]] = [
        ["evaluate", run.path],
        ["predict", run.path, "pictures/round"],
        ["fit", "--resume", run.path, "--epochs", "2"],
    ]
    for arguments in commands:
        code, _, err = command(*arguments)
        assert code == 0, err


@pytest.mark.slow
def test_two_stages(in_tmp_path: Path, command: Callable[..., Any]) -> None:
    original = applications.write_no_top(in_tmp_path / "no_top.h5")
    pictures.write_folder(in_tmp_path / "pictures", 12)
    code, _, err = command("fit", CONFIG, "--epochs", "1", *HEAD)
    assert code == 0, err
    assert "2,261,827 parameters, 3,843 trainable" in err
    Path("no_top.h5").unlink()
    head = open_run("head")
    check_restored(head, command)
    before = weights(head)
    for layer in original.layers:
        for one, other in zip(layer.get_weights(), before.get(layer.name, []), strict=True):
            np.testing.assert_array_equal(one, other)
    assert optimizer_variables(head) == 2 + 2 * 2  # steps and rate; two moments of kernel and bias

    code, _, err = command("fit", CONFIG, "--epochs", "1", *TUNED)
    assert code == 0, err
    tuned = open_run("tuned")
    summary = tuned.read_json("summary.json")
    initial = summary["initial_weights"]
    assert initial["validation"] == head.read_json("summary.json")["validation"]
    assert (len(initial["loaded"]), initial["not_loaded"]) == (105, {})
    assert (summary["parameters"], summary["trainable_parameters"]) == (2_261_827, 2_193_603)
    after = weights(tuned)
    for name, values in after.items():
        equal = all(np.array_equal(*each) for each in zip(before[name], values, strict=True))
        normalization = isinstance(original.get_layer(name), keras.layers.BatchNormalization)
        assert equal == normalization, name  # the others were trained
    shutil.rmtree(head.path)
    check_restored(tuned, command)


@pytest.mark.slow
def test_a_failed_download_is_one_line(in_tmp_path: Path) -> None:
    pictures.write_folder(in_tmp_path / "pictures", 4)
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **proxies, "KERAS_HOME": str(in_tmp_path / "keras")}
    program = [sys.executable, "-m", "trainer", "fit", str(CONFIG)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("trainer: ")]
    assert "_96_no_top.h5" in line
    assert line.endswith("set model.options.weights to its path")
    assert "Traceback" not in done.stderr
    assert not Path("runs").exists()
