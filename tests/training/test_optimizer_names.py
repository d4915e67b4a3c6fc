"""Runs and models of earlier versions name the optimizer FusedAdam: they open as Keras's Adam."""

import json
import zipfile
from pathlib import Path

import keras
import numpy as np

from trainer import keras_objects
from trainer.config import OptimizerConfig
from trainer.training.optimizer import make_optimizer


def test_the_old_name_makes_adam() -> None:
    config = OptimizerConfig(name="FusedAdam", options={"beta_1": 0.7})
    optimizer = make_optimizer(config, 10)
    assert type(optimizer) is keras.optimizers.Adam
    assert optimizer.beta_1 == 0.7
    assert keras_objects.find("optimizer", "fusedadam") is keras.optimizers.Adam


def test_a_model_saved_with_the_old_optimizer_opens_with_its_state(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.05, beta_2=0.9), loss="mse")
    x, y = np.random.default_rng(0).normal(size=(2, 16, 1)).astype(np.float32)
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "new.keras")
    old = {"module": "trainer.training.fused_adam", "class_name": "FusedAdam"}
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as source,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                config = json.loads(content)
                optimizer = config["compile_config"]["optimizer"]
                optimizer |= old | {"registered_name": "trainer>FusedAdam"}
                content = json.dumps(config).encode()
            target.writestr(name, content)
    opened = keras.saving.load_model(tmp_path / "old.keras")
    assert type(opened.optimizer) is keras.optimizers.Adam
    assert opened.optimizer.get_config() == model.optimizer.get_config()
    for found, expected in zip(opened.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(found, expected)
