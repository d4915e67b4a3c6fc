"""Networks of keras.applications as files: every format, and Keras without this package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import applications
import numpy as np
import pictures
import pytest

from trainer import models
from trainer.config import ModelConfig
from trainer.data import DataSpec
from trainer.experiment import restore
from trainer.run import Run
from trainer.saving.loading import load

CONFIG = Path(__file__).parents[2] / "configs" / "transfer.toml"
SMALL = ["--set", "data.image_size=[32, 32]", "--set", "training.batch_size=8"]
SMALL += ["--set", "logging.tensorboard=false", "--set", "training.precision=float32"]


@pytest.mark.slow
def test_an_application_can_be_saved_and_exported(
    in_tmp_path: Path, command: Callable[..., Any]
) -> None:
    """With swapped channels, in every format, and in Keras without this package."""
    pictures.write_folder(in_tmp_path / "pictures", 12)
    applications.write_no_top(in_tmp_path / "no_top.h5", "ResNet50")
    options = '{ name = "ResNet50", weights = "no_top.h5" }'
    arguments = ["--set", f"model.options={options}", "--set", 'model.freeze=["*/conv[1-4]_*"]']
    code, _, err = command("fit", CONFIG, "--epochs", "1", *SMALL, *arguments)
    assert code == 0, err
    (run,) = map(Run, Path("runs").iterdir())
    Path("no_top.h5").unlink()
    for kind in ("saved_model", "litert", "litert_int8", "onnx"):
        code, _, err = command("export", run.path, "--format", kind)
        assert code == 0, err
        assert " trainable, from the run" in next(
            Path("saved_models").rglob("README.md")
        ).read_text(encoding="utf-8")
    assert command("save", run.path, "model.keras")[0] == 0
    assert command("evaluate", "model.keras")[0] == 0
    np.save("images.npy", np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3), np.uint8))
    program = (
        "import keras, numpy as np, sys\n"
        "model = keras.saving.load_model('model.keras', safe_mode=True)\n"
        "np.save('probabilities.npy', model(np.load('images.npy')))\n"
        "assert 'trainer' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    expected = restore(run)(np.load("images.npy"))
    np.testing.assert_allclose(np.load("probabilities.npy"), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ConvNeXtTiny", "InceptionResNetV2", "MobileNetV3Small"])
def test_layers_of_applications_are_loaded_without_trust(name: str, in_tmp_path: Path) -> None:
    """These networks contain layers and operations that are not in keras.layers."""
    options = {"name": name, "weights": "none", "batch_normalization": "trained"}
    facts: dict[str, Any] = {"class_names": ("a", "b", "c"), "image_shape": (96, 96, 3)}
    facts |= {"name": "none", "version": "1", "fingerprint": "", "origin": "nowhere"}
    spec = DataSpec(**facts, train=1, validation=1, test=1)
    model = models.build(ModelConfig(name="application", options=options), spec)
    images = np.random.RandomState(0).randint(0, 256, (2, 96, 96, 3), np.uint8)
    model.save(in_tmp_path / "model.keras")
    loaded = load(in_tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(images), model(images), atol=1e-6)
