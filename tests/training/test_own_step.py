"""`training.step`: a function of the user trains the model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_loop import at_call_end, compare_weights

import trainer
from trainer.config import Config
from trainer.errors import InputError
from trainer.training.loop import CallRecord, Loop
from trainer.training.step import find_step, train_step

Make = Callable[..., Any]

MODULE = """
import keras, tensorflow as tf

def step(model, images, labels):
    with tf.GradientTape() as tape:
        outputs = model(images, training=True)
        loss = model.compute_loss(images, labels, outputs)
    weights = model.trainable_variables
    model.optimizer.apply(tape.gradient(loss, weights), weights)
    return {"loss": loss}

def noise(model, images):
    return {}

number = 3
"""
TINY = {
    "data.name": "synthetic",
    "data.options": {"examples": 100, "height": 6, "width": 6, "classes": 3},
    "model.name": "mlp",
    "model.options": {"units": [4]},
    "training.batch_size": 20,
    "training.epochs": 2,
    "logging.tensorboard": False,
}


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user in the working directory."""
    (tmp_path / "own_steps.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_steps", raising=False)
    return tmp_path


def plain_step(model: keras.Model, images: Any, labels: Any) -> dict[str, Any]:
    """Trains, and updates the metrics as in Keras's guide."""
    with tf.GradientTape() as tape:
        outputs = model(images, training=True)
        loss = model.compute_loss(images, labels, outputs)
    weights = model.trainable_variables
    model.optimizer.apply(tape.gradient(loss, weights), weights)
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(loss, sample_weight=tf.shape(labels)[0])
        else:
            metric.update_state(labels, outputs)
    return model.get_metrics_result()


def test_a_run_with_a_users_step(own_module: Path) -> None:
    config = Config().with_changes(TINY | {"training.step": "own_steps:step"})
    fitted = trainer.fit(config)
    history = fitted.model.history.history
    assert set(history) == {"loss", "val_loss", "val_accuracy"}  # it updates no metric
    assert len(history["loss"]) == 2
    assert fitted.run is not None
    # The evaluation of the run does not need the step.
    (own_module / "own_steps.py").unlink()
    del sys.modules["own_steps"]
    scores = trainer.evaluate(str(fitted.run.path))
    assert scores["loss"] == pytest.approx(fitted.summary["test"]["loss"], rel=1e-6)


def test_a_step_that_updates_the_metrics_equals_the_default(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    results = []
    for step in (train_step, plain_step):
        model, records = compiled_model(one_device), list[CallRecord]()
        history = Loop(model, one_device, step=step, gradient_norms=True).fit(
            batches_of(tiny.train, one_device, 7),
            batches_of(tiny.test, one_device, 5),
            epochs=2,
            callbacks=[at_call_end(records.append)],
        )
        results.append((model, history, records))
    (theirs, wanted, expected), (ours, found, records) = results
    compare_weights(ours, theirs)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name
    np.testing.assert_allclose(records[0].metrics["accuracy"], expected[0].metrics["accuracy"])
    assert expected[0].gradient_norms is not None
    assert records[0].gradient_norms is None  # it has no such parameter


def test_a_step_receives_the_options_that_it_accepts(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    received: list[Any] = []

    def clipped(model: Any, images: Any, labels: Any, *, clip_norm: Any) -> Any:
        received.append(clip_norm)
        return train_step(model, images, labels, clip_norm=clip_norm)

    def all_options(model: Any, images: Any, labels: Any, **options: Any) -> Any:
        received.append(options)
        return train_step(model, images, labels, **options)

    for step in (clipped, all_options):
        loop = Loop(compiled_model(one_device), one_device, step=step, clip_norm=0.5)
        loop.fit(batches_of(tiny.train, one_device, 32), epochs=1)
    every = {"clip_norm": 0.5, "gradient_norms": False, "batch_fraction": None}
    assert received == [0.5, every]


def test_a_step_with_batch_fraction_trains_on_several_devices(
    tiny: Any, compiled_model: Make, batches_of: Make, two_devices: Any
) -> None:
    def own(model: Any, images: Any, labels: Any, *, batch_fraction: Any) -> Any:
        return train_step(model, images, labels, batch_fraction=batch_fraction)

    histories = []
    for step in (train_step, own):
        model = compiled_model(two_devices)
        train = batches_of(tiny.train, two_devices, 7)
        histories.append(Loop(model, two_devices, step=step).fit(train, epochs=1))
    assert histories[0] == histories[1]
    with pytest.raises(InputError, match="on several devices expected a parameter batch_fraction"):
        Loop(compiled_model(two_devices), two_devices, step=plain_step)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_steps:noise", "expected a function of .model, images, labels., received noise"),
        ("own_steps:number", "expected a function of .model, images, labels."),
        ("own_steps:stop", "own_steps has no 'stop'"),
        ("no_such_module:step", "No module named 'no_such_module'"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, message: str, own_module: Path) -> None:
    with pytest.raises(InputError, match=f"training.step '{name}': .*{message}") as caught:
        trainer.fit(Config().with_changes(TINY | {"training.step": name}))
    assert "\n" not in str(caught.value)
    assert not (own_module / "runs").exists()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "expected a dictionary of logs with .*, received NoneType"),
        (
            {"accuracy": 1.0},
            "expected a dictionary of logs with 'loss' .a number., received accuracy",
        ),
        ({"loss": [1.0, 2.0]}, r"received loss \(2,\)"),
        ({"loss": "large"}, "received loss"),
    ],
)
def test_a_wrong_result_is_one_line(
    result: Any, message: str, tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    def broken(model: Any, images: Any, labels: Any) -> Any:  # noqa: ARG001
        return result

    loop = Loop(compiled_model(one_device), one_device, step=broken)
    with pytest.raises(InputError, match=f"training.step .*broken: .*{message}") as caught:
        loop.fit(batches_of(tiny.train, one_device, 32), epochs=1)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_the_step_is_refused(compiled_model: Make, one_device: Any) -> None:
    model = compiled_model(one_device)
    with pytest.raises(InputError, match=r"training.clip_norm: .*plain_step has no parameter cl"):
        Loop(model, one_device, step=plain_step, clip_norm=1.0)
    model.train_step = lambda data: data
    with pytest.raises(InputError, match="expected a model without its own train_step"):
        Loop(model, one_device, step=plain_step)
    assert find_step("trainer.training.step:train_step") is train_step
