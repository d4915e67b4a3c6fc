"""The checks of `trainer doctor` that build the training step of a configuration."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from graphs import OWN_LAYERS

from trainer.config import Config
from trainer.config_file import load_config
from trainer.doctor import checks
from trainer.errors import MissingError

if not tf.sysconfig.get_build_info()["is_cuda_build"]:
    pytest.skip("this TensorFlow lists no GPU kernels", allow_module_level=True)

OWN_OBJECTS = f"""{OWN_LAYERS}
def rounded(labels, outputs):
    images = tf.cast(tf.one_hot(tf.cast(labels, tf.int32), 4) * 255, tf.uint8)
    wanted = tf.cast(tf.gather(images, tf.range(tf.shape(images)[0])), outputs.dtype) / 255
    return tf.reduce_mean(tf.square(outputs - wanted), axis=-1)
"""


@pytest.fixture
def own_config(in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A network with layers and a loss of the user's module `doctor_objects`."""
    (in_tmp_path / "doctor_objects.py").write_text(OWN_OBJECTS)
    monkeypatch.syspath_prepend(in_tmp_path)
    monkeypatch.delitem(sys.modules, "doctor_objects", raising=False)
    layers = [{"name": f"doctor_objects:{name}"} for name in ("Shift", "Outside")]
    return Config().with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 200, "height": 8, "width": 8, "classes": 4},
            "model.name": "layers",
            "model.options": {"layers": [*layers, {"name": "Flatten"}]},
            "training.batch_size": 48,
            "training.loss": "doctor_objects:rounded",
        }
    )


def check_finding(kernels: tuple[str, ...]) -> None:
    assert kernels[0] == "note"
    assert "3 of the " in kernels[1]
    assert "GatherV2 in the step (" in kernels[1]
    assert "RandomShuffle in layer 'shift'" in kernels[1]
    assert "PyFunc in layer 'outside'" in kernels[1]


def test_layer_and_operation_without_a_kernel_are_named(own_config: Config) -> None:
    check_finding(checks._kernels(own_config))


@pytest.mark.slow
def test_the_verb_checks_the_step_of_the_configuration(
    own_config: Config, command: Callable[..., Any]
) -> None:
    Path("own.toml").write_text(own_config.to_toml())
    _, out, _ = command("doctor", "own.toml", "--json")
    found = {each.pop("subject"): tuple(each.values()) for each in json.loads(out)}
    check_finding(found["GPU kernels"])


def test_the_step_of_the_default_configuration_has_all_kernels() -> None:
    path = Path(__file__).parents[2] / "configs" / "mnist.toml"
    config = load_config(path).with_changes({"data.name": "synthetic"})
    status, value, _ = checks._kernels(config)
    assert status == "ok"
    assert value.startswith("all ")
    assert value.endswith(" operations of the training step have a GPU kernel")


def test_nothing_is_downloaded_to_check_kernels(in_tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cifar10 is not prepared"):
        checks._kernels(Config().with_changes({"data.name": "cifar10"}))
    assert list(in_tmp_path.iterdir()) == []
