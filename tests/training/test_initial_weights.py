"""`training.init_from`: which layers are loaded, from what, and what a run records."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import trainer
from trainer.errors import InputError
from trainer.resuming import newest_checkpoint
from trainer.run import Run, open_run
from trainer.training.initial_weights import load_initial_weights


def dense(name: str, units: int, **options: Any) -> dict[str, Any]:
    return {"name": "Dense", "options": {"name": name, "units": units, **options}}


LAYERS = [
    {"name": "Flatten"},
    dense("one", 12, activation="relu"),
    {"name": "BatchNormalization"},
    dense("two", 12, activation="relu"),
]
SETTINGS: dict[str, Any] = {
    "data.name": "synthetic",
    "data.options": {"examples": 300, "height": 6, "width": 6, "classes": 3},
    "model.name": "layers",
    "model.options": {"layers": LAYERS},
    "training.epochs": 2,
    "training.batch_size": 32,
    "training.precision": "mixed_bfloat16",
    "logging.tensorboard": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    folder = tmp_path_factory.mktemp("source")
    changes = {"logging.directory": str(folder / "runs"), "logging.name": "source"}
    run = trainer.fit(trainer.Config().with_changes(SETTINGS | changes)).run
    assert run is not None
    return run


@pytest.fixture
def fit(source: Run) -> Callable[..., Any]:
    """Trains a network beside the source run; returns the result."""

    def train(init_from: object, *, callbacks: Any = (), **changes: Any) -> Any:
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        changes["logging.directory"] = str(source.path.parent)
        changes["training.init_from"] = str(init_from)
        config = trainer.Config().with_changes(SETTINGS | changes)
        return trainer.fit(config, callbacks=callbacks)

    return train


class Killed(BaseException):
    """The end of the process."""


class Kill(keras.callbacks.Callback):
    """Ends the training before its first step, if it is active."""

    active = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        if self.active:
            raise Killed


@pytest.fixture
def killed(
    fit: Callable[..., Any], source: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[[object], Run]:
    """Starts a run that is killed before its first step."""

    def start(init_from: object) -> Run:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Kill, "active", True)
            fit(init_from, callbacks=[Kill()], training__epochs=1, logging__name="killed")
        return open_run("killed", runs_directory=str(source.path.parent), unfinished=True)

    return start


@pytest.mark.parametrize("device", ["cpu", pytest.param("all", marks=pytest.mark.slow)])
def test_a_run_starts_where_its_source_ended(
    device: str, fit: Callable[..., Any], source: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """On the device of the source, the scores before training are equal, bit for bit."""
    caplog.set_level("INFO", logger="trainer")
    if device == "all":
        source = fit("source", training__device="all", logging__name="on-two").run
    result = fit(source.name, training__device=device, training__epochs=1)
    initial = result.summary["initial_weights"]
    assert initial["validation"] == source.read_json("summary.json")["validation"]
    assert initial["source"] == str(source.path) == result.run.config().training.init_from
    assert initial["sha256"] == source.read_json("summary.json")["weights_sha256"]
    assert sorted(initial["loaded"]) == ["batch_normalization", "logits", "one", "two"]
    assert initial["not_loaded"] == {}
    [*_, line] = [line for line in caplog.messages if line.startswith("start ")]
    assert f"val_loss {initial['validation']['loss']:.4f}" in line
    assert line.endswith("before training")
    [*_, line] = [line for line in caplog.messages if line.startswith("weights ")]
    assert f"4 layers loaded from {source.path} (" in line
    assert line.endswith("), 0 not loaded")


def test_layers_are_matched_by_path_and_shape(fit: Callable[..., Any], source: Run) -> None:
    """In another order, with new layers between them, and with other classes."""
    flatten, one, normalization, two = LAYERS
    layers = [flatten, one, two, dense("new", 12), normalization]
    data = SETTINGS["data.options"] | {"classes": 5}
    result = fit(
        source.path,
        model__options={"layers": layers},
        data__options=data,
        optimizer__learning_rate=1e-12,
        training__precision="float32",
        training__epochs=1,
    )
    initial = result.summary["initial_weights"]
    assert sorted(initial["loaded"]) == ["batch_normalization", "one", "two"]
    assert initial["not_loaded"] == {
        "logits": "expected shapes [[12, 5], [5]], received [[12, 3], [3]]",
        "new": "not in the source",
    }
    with h5py.File(source.weights) as file:
        groups = file["layers"].values()
        weights = {group["vars"].attrs["name"]: group["vars"] for group in groups}
        for name in ("one", "two"):
            kernel = result.model.get_layer(name).kernel.numpy()
            np.testing.assert_allclose(kernel, weights[name]["0"][...], atol=1e-6)


def test_a_resumed_run_does_not_need_its_source(
    fit: Callable[..., Any], source: Run, killed: Callable[[object], Run]
) -> None:
    copy = source.path.with_name("copy.weights.h5")
    copy.write_bytes(source.weights.read_bytes())
    whole = fit(copy, callbacks=[Kill()], training__epochs=1)
    run = killed(copy)
    saved = newest_checkpoint(run)
    assert saved is not None
    assert (saved.progress.epoch, saved.progress.step) == (0, 0)
    copy.unlink()
    resumed = trainer.resume(str(run.path), callbacks=[Kill()])
    assert resumed.summary["initial_weights"] == whole.summary["initial_weights"]
    for one, other in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert trainer.evaluate(str(run.path))["loss"] == resumed.summary["test"]["loss"]


def network(width: int = 4) -> keras.Model:
    """A network whose inner layers have no names."""
    images = keras.Input((4, 4, 1))
    inner = keras.Sequential([keras.layers.Dense(width), keras.layers.Dense(4)], name="inner")
    x = keras.layers.Dense(3)(inner(keras.layers.Flatten()(images)))
    return keras.Model(images, x)


@pytest.mark.parametrize("name", ["a.weights.h5", "a.keras"])
def test_files_of_keras_are_sources(name: str, tmp_path: Path) -> None:
    saved, model = network(), network()  # Keras numbers their layers differently
    saved.save_weights(tmp_path / name) if name.endswith("h5") else saved.save(tmp_path / name)
    initial = load_initial_weights(model, str(tmp_path / name))
    assert sorted(initial.loaded) == ["dense", "inner/dense", "inner/dense_1"]
    for one, other in zip(saved.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    other = network(width=5)
    before = [weight.copy() for weight in other.get_weights()]
    initial = load_initial_weights(other, str(tmp_path / name))
    assert initial.loaded == ["dense"]
    assert (
        initial.not_loaded["inner/dense"]
        == "expected shapes [[16, 5], [5]], received [[16, 4], [4]]"
    )
    np.testing.assert_array_equal(other.get_weights()[0], before[0])
    np.testing.assert_array_equal(other.get_weights()[-2], saved.get_weights()[-2])


def test_wrong_sources_are_refused_in_one_line(
    fit: Callable[..., Any], source: Run, tmp_path: Path, killed: Callable[[object], Run]
) -> None:
    runs = source.path.parent
    names = {path.name for path in runs.iterdir()}
    other = {"layers": [{"name": "Flatten"}, dense("other", 7)]}
    for name, text in [("a.h5", "x"), ("b.weights.h5", "no weights"), ("c.keras", "no archive")]:
        (tmp_path / name).write_text(text)
    with h5py.File(tmp_path / "e.weights.h5", "w") as odd:
        odd["layers/dense/vars"] = 3.0
    with zipfile.ZipFile(tmp_path / "d.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    for reference, changes, message in [
        (source.path, {"model__options": other}, "expected layers with the same path and shape"),
        ("nowhere.weights.h5", {}, "training.init_from: nowhere.weights.h5 cannot be read: "),
        (tmp_path / "a.h5", {}, f"there is no run '{tmp_path}/a.h5': "),
        (tmp_path / "b.weights.h5", {}, "b.weights.h5 cannot be read: "),
        (tmp_path / "c.keras", {}, "c.keras cannot be read: "),
        (tmp_path / "e.weights.h5", {}, "e.weights.h5 cannot be read: "),
        (tmp_path / "d.keras", {}, "d.keras cannot be read: "),
        ("sauce", {}, "there is no run 'sauce': available: "),
    ]:
        with pytest.raises(InputError) as caught:
            fit(reference, **changes)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path.name for path in runs.iterdir()} == names
    run = killed(source.path)
    with pytest.raises(InputError, match="is not finished: continue it with"):
        fit(run.path)
