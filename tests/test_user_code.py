"""Errors in the user's code: one line with type, message, file and line number; exit code 2."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer import workflow

PARTS = """
import keras
import tensorflow as tf


class Early(keras.layers.Layer):
    def call(self, x):
        return x + undefined  # HERE Early


class Identity(keras.layers.Layer):
    def compute_output_shape(self, shape):
        return shape


class Traced(Identity):
    def call(self, x, training=False):
        if training:
            raise ZeroDivisionError("not\\nin training")  # HERE Traced
        return x


class AtRunTime(Identity):
    def call(self, x, training=False):
        if training:
            largest = tf.reduce_max(tf.cast(x, tf.float32))
            tf.debugging.assert_less(largest, 0.0, message="too bright")  # HERE AtRunTime
        return x


class InPython(Identity):
    def call(self, x, training=False):
        def fail(x):
            raise KeyError("in python")  # HERE InPython

        return tf.ensure_shape(tf.py_function(fail, [x], x.dtype), x.shape) if training else x


class AutoGraph(Identity):
    @tf.function
    def helper(self, x):
        if tf.reduce_max(x) > 0:
            raise RuntimeError("in a graph")  # HERE AutoGraph
        return x

    def call(self, x, training=False):
        return self.helper(x) if training else x


def constant(labels, outputs):
    return tf.zeros_like(outputs[:, 0])


class NoFile(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        open("there-is-none")  # HERE NoFile


class Refuses(keras.callbacks.Callback):
    def __init__(self, patience=1):
        super().__init__()
        raise ValueError(f"patience is {patience}")  # HERE Refuses


def ends(labels, outputs):
    raise SystemExit(0)  # HERE ends


class Ends(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise SystemExit(0)  # HERE Ends


class WrongMethod(keras.callbacks.Callback):
    def on_epoch_end(self):
        pass


def loss(labels, outputs):
    assert labels is None, "no labels"  # HERE loss


class Metric(keras.metrics.Metric):
    def update_state(self, labels, outputs, sample_weight=None):
        raise AttributeError("no attribute")  # HERE Metric
"""
OWN_DATA = """
def load(config):
    return 1 / 0  # HERE data
"""
OWN_NETWORK = """
def build(spec, *, units: int = 3):
    raise IndexError("no such unit")  # HERE network
"""
LAYERS = ("--set", "model.name=layers", "--set")


def layer(name: str) -> list[str]:
    return [*LAYERS, f'model.options.layers=["own_parts:{name}"]']


def part(key: str, name: str) -> list[str]:
    value = f'"own_parts:{name}"'
    return ["--set", f"training.{key}={value if key == 'loss' else f'[{value}]'}"]


CASES: dict[str, tuple[list[str], str]] = {
    "Early": (layer("Early"), "NameError: name 'undefined' is not defined"),
    "Traced": (layer("Traced"), "ZeroDivisionError: not in training"),
    "AtRunTime": (layer("AtRunTime"), "InvalidArgumentError: assertion failed: [too bright]"),
    "InPython": (layer("InPython"), "UnknownError: KeyError: 'in python'"),
    "AutoGraph": (layer("AutoGraph"), "RuntimeError: in a graph"),
    "NoFile": (part("callbacks", "NoFile"), "FileNotFoundError: [Errno 2] No such file or dir"),
    "Refuses": (part("callbacks", "Refuses"), "ValueError: patience is 1"),
    "ends": (part("loss", "ends"), "SystemExit: 0"),
    "Ends": (part("callbacks", "Ends"), "SystemExit: 0"),
    "loss": (part("loss", "loss"), "AssertionError: no labels"),
    "Metric": (part("metrics", "Metric"), "AttributeError: no attribute"),
    "data": (["--set", "data.name=own"], "ZeroDivisionError: division by zero"),
    "network": (["--set", "model.name=own"], "IndexError: no such unit"),
}


@pytest.fixture
def fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `trainer fit` in a folder with the user's code; returns exit code and stderr."""
    from trainer import data, models

    for package, code in ((data, OWN_DATA), (models, OWN_NETWORK)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "own.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    (tmp_path / "own_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = Path(workflow.__file__).parent.parent / "configs" / "debug.toml"
    calm = ("--epochs", "1", "--set", "logging.tensorboard=false")

    def fit(*options: str) -> tuple[int, str]:
        code, _, err = command("fit", config, *calm, *options)
        return code, err

    yield fit
    for name in ("own_parts", "trainer.data.own", "trainer.models.own"):
        sys.modules.pop(name, None)
    for package in (data, models):
        vars(package).pop("own", None)


def place(name: str) -> str:
    """Returns file and line number of the mark with this name, as errors print them."""
    for path in Path().rglob("own*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.endswith(f"# HERE {name}"):
                return f"{path}:{number}"
    raise AssertionError(name)


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_the_user_is_one_line_with_its_location(
    fit: Callable[..., tuple[int, str]], name: str
) -> None:
    options, said = CASES[name]
    code, err = fit(*options)
    lines = [line for line in err.splitlines() if line.startswith("trainer: ")]
    assert (code, len(lines)) == (2, 1), err
    assert said in lines[0]
    assert f"({place(name)}, in " in lines[0]
    assert "Traceback" not in err
    logs = [path.read_text() for path in Path().glob("runs/*/log.txt")]
    # Errors before the training create no run.
    in_training = ("Traced", "AtRunTime", "InPython", "AutoGraph", "NoFile", "Ends")
    assert bool(logs) == (name in in_training)
    assert all("Traceback (most recent call last)" in log for log in logs)


def test_methods_of_callbacks_need_their_parameters(fit: Callable[..., tuple[int, str]]) -> None:
    code, err = fit(*part("callbacks", "WrongMethod"))
    assert code == 2
    assert "callback 'WrongMethod': on_epoch_end: expected 2 arguments" in err
    assert not list(Path().glob("runs/*"))


def test_a_loss_without_gradient_is_refused(fit: Callable[..., tuple[int, str]]) -> None:
    code, err = fit(*part("loss", "constant"))
    assert code == 2
    assert "training.loss: expected a loss that depends on weights" in err


def test_the_traceback_of_the_user_is_printed_on_request(
    fit: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")
    for name in ("loss", "network"):  # raised directly, and as the cause of our error
        code, err = fit(*CASES[name][0])
        assert code == 2
        file, _, line = place(name).rpartition(":")
        assert re.search(rf'File ".*{file}", line {line}, in ', err)
        assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def load(config:\n", "SyntaxError: '(' was never closed"),
        ("import there_is_no_such_package\n", "ModuleNotFoundError: No module named"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_of_the_user_that_cannot_be_imported_is_named(
    fit: Callable[..., tuple[int, str]], code: str, said: str
) -> None:
    Path("trainer.data/own.py").write_text(code)
    exit_code, err = fit("--set", "data.name=own")
    assert exit_code == 2
    assert said in err
    assert "(trainer.data/own.py:1, in <module>)" in err


def test_a_defect_of_this_package_keeps_its_traceback(
    fit: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "build_experiment", None)
    with pytest.raises(TypeError, match="not callable"):
        fit()
