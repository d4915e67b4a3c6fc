"""The check of a network's gradients: correct layers pass, wrong gradients and kinks are found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from samples import model_options, sample_shape, skip_if_refused

from trainer import models
from trainer.config import Config
from trainer.errors import CheckError, InputError
from trainer.gradient import network

SYNTHETIC = {"examples": 100, "height": 12, "width": 12, "classes": 4}
SMALL: dict[str, dict[str, Any]] = {
    "cnn": {"filters": [3, 4], "dense": 8},
    "layers": {},
    "mlp": {"units": [8]},
}


def configured(name: str, **options: Any) -> Config:
    changes = {"data.name": "synthetic", "data.options": SYNTHETIC, "model.name": name}
    return Config().with_changes(changes | {"model.options": SMALL.get(name, {}) | options})


@pytest.mark.parametrize("name", models.names())
def test_the_gradients_of_every_network_are_right(name: str) -> None:
    height, width, channels = sample_shape(name, (12, 12, 1))
    images = {"height": height, "width": width, "channels": channels}
    config = configured(name, **model_options(name))
    config = config.with_changes({"data.options": SYNTHETIC | images})
    try:
        found = network.check(config)
    except InputError as refused:
        if name in SMALL:
            raise
        skip_if_refused(name, refused)
    assert found.passed, found.verdict
    rows = found.document["weights"]
    assert len(rows) >= 2
    for row in rows:
        assert row["compared"] + row["kinks"] == min(row["entries"], network.ENTRIES)
        assert row["compared"] > row["kinks"]
        assert row["connected"]
    assert keras.config.floatx() == "float32"
    assert keras.config.dtype_policy().name == "float32"


@keras.saving.register_keras_serializable(package="test_gradient")
class WrongGradient(keras.layers.Layer):
    """Doubles its input, with the gradient of a factor of 3."""

    def call(self, inputs: Any) -> Any:
        @tf.custom_gradient
        def double(x: Any) -> Any:
            return 2 * x, lambda upstream: 3 * upstream

        return double(inputs)


@keras.saving.register_keras_serializable(package="test_gradient")
class AlwaysRandom(keras.layers.Layer):
    """Adds random numbers, also for training=False."""

    def call(self, inputs: Any) -> Any:
        return inputs + tf.random.normal(tf.shape(inputs), dtype=inputs.dtype)


@keras.saving.register_keras_serializable(package="test_gradient")
class NotConnected(keras.layers.Layer):
    """Has a weight that its output does not depend on."""

    def build(self, _: Any) -> None:
        self.unused = self.add_weight(shape=(3,), name="unused")

    def call(self, inputs: Any) -> Any:
        return inputs


@keras.saving.register_keras_serializable(package="test_gradient")
class NotFinite(keras.layers.Layer):
    """Divides by 0."""

    def call(self, inputs: Any) -> Any:
        return inputs / tf.zeros_like(inputs)


def test_a_layer_with_a_wrong_gradient_is_found(
    command: Callable[..., Any], in_tmp_path: Path
) -> None:
    layers = ["Flatten", {"name": "Dense", "options": {"units": 5, "activation": "tanh"}}]
    config = configured("layers", layers=[*layers, "test_gradient>WrongGradient"])
    (in_tmp_path / "wrong.toml").write_text(config.to_toml())
    code, out, err = command("gradient", "--model", "wrong.toml", "--json")
    assert code == 4
    assert "dense" in err
    document = json.loads(out)
    assert [weight["passed"] for weight in document["weights"]] == [False, False, True, True]
    assert json.loads((in_tmp_path / document["run"] / "gradient.json").read_text()) == {
        key: value for key, value in document.items() if key != "run"
    }
    config = configured("layers", layers=[*layers, "test_gradient>NotConnected"])
    (in_tmp_path / "correct.toml").write_text(config.to_toml())
    code, out, err = command("gradient", "--model", "correct.toml")
    assert (code, err) == (0, "")
    assert "dropout is off" in out
    (row,) = (line.split() for line in out.splitlines() if "not_connected/unused" in line)
    assert row[-4:] == ["0", "0", "False", "True"]  # largest, relative error, connected, passed


def test_kinks_are_found_without_the_gradient_under_test() -> None:
    """The loss is the sum of |w|: at the kink, within one or two steps of it, and far from it."""
    weight = keras.Variable([0.0, 0.7 * network.STEP, 1.7 * network.STEP, 0.5], dtype="float64")

    def loss() -> float:
        return float(np.abs(np.array(weight)).sum())

    for gradient, passed in (([0.0, 1, 1, 1], True), ([0.0, 1, 1, 1.1], False)):
        row = network.check_weight(loss, weight, np.array(gradient), np.random.default_rng(0))
        assert (row["compared"], row["kinks"], row["passed"]) == (1, 3, passed)
    weight = keras.Variable([0.0, 0.0], dtype="float64")
    row = network.check_weight(loss, weight, np.zeros(2), np.random.default_rng(0))
    assert (row["compared"], row["kinks"], row["passed"]) == (0, 2, False)


def test_networks_that_cannot_be_checked_are_refused() -> None:
    own_type = {"name": "Dense", "options": {"units": 3, "dtype": "float32"}}
    with pytest.raises(
        InputError, match=r"expected weights that follow the dtype policy.* received float32"
    ):
        network.check(configured("layers", layers=["Flatten", own_type]))
    with pytest.raises(InputError, match="loss: expected the same number in each call"):
        network.check(configured("layers", layers=["Flatten", "test_gradient>AlwaysRandom"]))
    with pytest.raises(CheckError, match="expected a finite number, received nan"):
        network.check(configured("layers", layers=["Flatten", "test_gradient>NotFinite"]))
