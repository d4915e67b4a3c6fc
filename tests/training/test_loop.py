"""The loop: callbacks and objects behave as in Keras's fit; call records; evaluation."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import DataConfig, ModelConfig
from trainer.data import load
from trainer.errors import CheckError
from trainer.models import build
from trainer.training.batches import make_batches
from trainer.training.loop import CallRecord, Loop

Make = Callable[..., Any]


def keras_fit(
    model: keras.Model,
    tiny: Any,
    *,
    epochs: int,
    callbacks: list[Any],
    steps_per_execution: int = 4,
) -> dict[str, list[float]]:
    """Trains with Keras's fit: 8 batches of 8 images, validated on 4 batches of at most 5."""
    images, labels = tiny.train.read()
    model.steps_per_execution = steps_per_execution
    fitted = model.fit(
        images,
        labels,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        validation_data=tiny.test.read(),
        validation_batch_size=5,
    )
    history: dict[str, list[float]] = fitted.history
    return history


def at_call_end(*functions: Callable[[CallRecord], Any]) -> keras.callbacks.Callback:
    """Returns a callback that calls each function with the record of each call."""
    callback = keras.callbacks.Callback()
    callback.on_call_end = lambda record: [function(record) for function in functions]
    return callback


class Recorder(keras.callbacks.Callback):
    """A user's callback that records its calls and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        for moment in ("begin", "end"):
            for part in ("train", "test", "predict"):
                self._record(f"on_{part}_{moment}")
                self._record(f"on_{part}_batch_{moment}")
            self._record(f"on_epoch_{moment}")

    def _record(self, name: str) -> None:
        def method(*arguments: Any, logs: dict[str, float] | None = None) -> None:
            numbers = [a for a in arguments if isinstance(a, int)]
            given = next((a for a in arguments if isinstance(a, dict)), logs) or {}
            self.calls.append((name, *numbers, *sorted(given)))

        setattr(self, name, method)


def compare_weights(found: keras.Model, wanted: keras.Model) -> None:
    for a, b in zip(found.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def compare_histories(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name


def both_ways(
    tiny: Any,
    compiled_model: Make,
    batches_of: Make,
    one_device: Any,
    callbacks: Callable[[str], list[Any]],
    *,
    epochs: int,
    **options: Any,
) -> tuple[dict[str, list[float]], dict[str, list[float]], keras.Model, keras.Model]:
    """Trains equal models with Keras's fit and with our loop; returns histories and models."""
    theirs, ours = compiled_model(**options), compiled_model(one_device, **options)
    wanted = keras_fit(theirs, tiny, epochs=epochs, callbacks=callbacks("keras"))
    found = Loop(ours, one_device, steps_per_execution=4).fit(
        batches_of(tiny.train, one_device, 8),
        batches_of(tiny.test, one_device, 5),
        epochs=epochs,
        callbacks=callbacks("ours"),
    )
    return found, wanted, ours, theirs


def test_callbacks_that_stop_restore_and_save_work_as_under_keras_fit(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any, tmp_path: Path
) -> None:
    recorders: dict[str, Recorder] = {}

    def callbacks(who: str) -> list[Any]:
        recorders[who] = Recorder()
        return [
            keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                tmp_path / f"{who}.keras", monitor="val_loss", save_best_only=True
            ),
            keras.callbacks.ModelCheckpoint(
                tmp_path / f"{who}-{{epoch}}.weights.h5", save_weights_only=True
            ),
            keras.callbacks.CSVLogger(tmp_path / f"{who}.csv"),
            recorders[who],
        ]

    # The rate is too high, so the validation loss soon rises.
    found, wanted, ours, theirs = both_ways(
        tiny,
        compiled_model,
        batches_of,
        one_device,
        callbacks,
        epochs=12,
        optimizer=lambda: keras.optimizers.Adam(0.3),
    )
    compare_histories(found, wanted)
    stopped = len(found["loss"])
    assert 3 <= stopped < 12  # EarlyStopping stopped it
    compare_weights(ours, theirs)
    best = keras.saving.load_model(tmp_path / "ours.keras")
    compare_weights(ours, best)  # and restored what ModelCheckpoint kept as the best
    last = keras.models.clone_model(ours)
    last.load_weights(tmp_path / f"ours-{stopped}.weights.h5")
    assert any((a != b).any() for a, b in zip(last.get_weights(), best.get_weights(), strict=True))
    tables = [
        np.genfromtxt(tmp_path / f"{who}.csv", delimiter=",", names=True)
        for who in ("ours", "keras")
    ]
    assert tables[0].dtype.names == tables[1].dtype.names
    assert len(tables[0]) == stopped
    for name in tables[0].dtype.names:
        np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=1e-6)
    # Every method of a callback was called in the same order, with the same numbers and logs.
    assert recorders["ours"].calls == recorders["keras"].calls
    assert recorders["ours"].params == recorders["keras"].params
    assert ("on_train_batch_end", 7, "accuracy", "loss") in recorders["ours"].calls


def test_callbacks_that_set_the_learning_rate_work_as_under_keras_fit(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    def callbacks(_: str) -> list[Any]:
        return [
            keras.callbacks.LearningRateScheduler(
                lambda epoch, rate: rate * (2 if epoch == 1 else 1)
            ),
            # No loss falls by 10, so each epoch but the first halves the rate at its end.
            keras.callbacks.ReduceLROnPlateau("val_loss", 0.5, patience=1, min_delta=10.0),
        ]

    found, wanted, ours, theirs = both_ways(
        tiny,
        compiled_model,
        batches_of,
        one_device,
        callbacks,
        epochs=4,
        optimizer=lambda: keras.optimizers.SGD(0.1),
    )
    compare_histories(found, wanted)
    assert found["learning_rate"] == pytest.approx([0.1, 0.2, 0.1, 0.05])
    compare_weights(ours, theirs)


class Scale(keras.layers.Layer):
    """A user's layer: a factor for each feature, and an additional loss."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * keras.ops.sum(self.factor**2))
        return x * self.factor


class Focal(keras.losses.Loss):
    """A user's loss."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        y_true = keras.ops.cast(keras.ops.reshape(y_true, (-1,)), "int32")
        p = keras.ops.sum(keras.ops.one_hot(y_true, 3) * y_pred, axis=-1)
        return -((1 - p) ** 2) * keras.ops.log(p)


class Count(keras.metrics.Metric):
    """A user's metric: the number of images."""

    def __init__(self, name: str = "images_seen", **options: Any) -> None:
        super().__init__(name=name, **options)
        self.seen = self.add_weight(shape=(), initializer="zeros", name="seen")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:  # noqa: ARG002
        self.seen.assign_add(keras.ops.cast(keras.ops.shape(y_pred)[0], "float32"))

    def result(self) -> Any:
        return self.seen + 0.0


class SignDescent(keras.optimizers.Optimizer):
    """A user's optimizer."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        rate = keras.ops.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, rate * keras.ops.sign(gradient))


def test_own_layer_loss_metric_and_optimizer_work_as_under_keras_fit(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    found, wanted, ours, theirs = both_ways(
        tiny,
        compiled_model,
        batches_of,
        one_device,
        lambda _: [],
        epochs=2,
        optimizer=lambda: SignDescent(0.002),
        loss=Focal(),
        metrics=[Count()],
        own_layers=lambda: [Scale(name="scale_own")],
    )
    compare_histories(found, wanted)
    compare_weights(ours, theirs)
    assert found["images_seen"] == [64.0, 64.0]
    assert found["val_images_seen"] == [17.0, 17.0]
    # 16 steps of 0.002 have changed the weights of the layer.
    assert not np.array_equal(ours.get_layer("scale_own").factor.numpy(), np.ones(8))


def test_weights_averaged_by_the_optimizer_are_those_at_the_end(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    # Keras's fit replaces the weights by their moving average when it ends.
    model = compiled_model(
        one_device, optimizer=lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.75)
    )
    weights: list[Any] = []
    Loop(model, one_device, steps_per_execution=1).fit(
        batches_of(tiny.train, one_device, 16),
        epochs=1,
        callbacks=[at_call_end(lambda _: weights.append(model.get_weights()))],
    )
    for i, found in enumerate(model.get_weights()):
        average = weights[0][i]
        for step in weights[1:]:
            average = 0.75 * average + 0.25 * step[i]
        np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-7)


def test_steps_per_execution_repetition_and_validation_change_no_bit(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    ends = []
    for steps_per_execution, validation in [(1, None), (50, None), (50, tiny.validation)]:
        model = compiled_model(one_device, dropout=0.5)
        train = batches_of(tiny.train, one_device, 7, seed=5)
        scored = validation and batches_of(validation, one_device, 3)
        loop = Loop(model, one_device, steps_per_execution=steps_per_execution)
        history = loop.fit(train, scored, epochs=2)
        assert ("val_loss" in history) == (validation is not None)
        ends.append([*model.get_weights(), history["loss"], history["accuracy"]])
    for one, many, validated in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, many)
        np.testing.assert_array_equal(many, validated)


def test_dropout_drops_in_training_and_not_in_evaluation(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    # A rate of 0 learns nothing: the losses of two epochs differ only by dropout.
    model = compiled_model(one_device, dropout=0.5, optimizer=lambda: keras.optimizers.SGD(0.0))
    loop = Loop(model, one_device)
    train = batches_of(tiny.train, one_device, 16)
    losses = loop.fit(train, epochs=2)["loss"]
    assert losses[0] != losses[1]
    score, _ = loop.evaluate(train)
    images, labels = tiny.train.read()
    probabilities = model(images, training=False).numpy()
    expected = -np.log(probabilities[np.arange(64), labels]).mean()
    assert score["loss"] == pytest.approx(expected, rel=1e-5)


def infinite_at(label: int) -> Callable[[Any, Any], Any]:
    """A loss that is infinite for one label."""

    def loss(labels: Any, outputs: Any) -> Any:
        each = keras.losses.sparse_categorical_crossentropy(labels, outputs)
        return tf.where(tf.reshape(labels, tf.shape(each)) == label, np.inf, each)

    return loss


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_infinite_loss_names_the_step(
    steps_per_execution: int, tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    labels = tiny.train.labels.copy()
    labels[labels == 2] = 1
    labels[tiny.train.rows[45]] = 2  # of batches of 8, the sixth
    split = type(tiny.train)(tiny.train.images, labels, tiny.train.rows)
    model = compiled_model(one_device, loss=infinite_at(2))
    recorder, records = Recorder(), []
    loop = Loop(model, one_device, steps_per_execution=steps_per_execution)
    with pytest.raises(CheckError, match=r"the loss became inf at step 6 \(epoch 1 of 3\)"):
        loop.fit(
            batches_of(split, one_device, 8),
            epochs=3,
            callbacks=[recorder, keras.callbacks.TerminateOnNaN(), at_call_end(records.append)],
        )
    # The record is still passed to callbacks, and they can close their files.
    losses = np.concatenate([record.loss for record in records])
    assert np.isfinite(losses[:5]).all()
    assert losses[5] == np.inf
    assert recorder.calls[-1][0] == "on_train_end"


def test_nan_loss_names_the_step(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    # With an infinite rate, the first step of the second epoch makes the weights infinite.
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 if epoch == 0 else float("inf"))
    stop = keras.callbacks.TerminateOnNaN()
    model = compiled_model(one_device, optimizer=lambda: keras.optimizers.SGD(0.1))
    loop = Loop(model, one_device, steps_per_execution=4)
    with pytest.raises(CheckError, match=r"the loss became nan at step 10 \(epoch 2 of 3\)"):
        loop.fit(batches_of(tiny.train, one_device, 8), epochs=3, callbacks=[rates, stop])
    assert model.stop_training  # TerminateOnNaN saw it in the logs


def test_records_add_up_and_have_rate_and_metrics_of_each_step(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 12], [0.5, 0.05, 0.005])
    model = compiled_model(one_device, optimizer=lambda: keras.optimizers.SGD(schedule))
    loop = Loop(model, one_device, steps_per_execution=4)
    records: list[CallRecord] = []
    train = batches_of(tiny.train, one_device, 7)  # ten batches, the last of one image
    loop.fit(train, epochs=2, callbacks=[at_call_end(records.append)])

    assert [w.epoch for w in records] == [0, 0, 0, 1, 1, 1]
    assert [w.first_step for w in records] == [0, 4, 8, 10, 14, 18]
    assert [w.steps for w in records] == [4, 4, 2, 4, 4, 2]
    assert [w.images for w in records] == [28, 28, 8, 28, 28, 8]
    assert [w.warm for w in records] == [False] + [True] * 5
    assert all(w.seconds > 0 for w in records)
    assert loop.seconds.training == pytest.approx(sum(w.seconds for w in records))
    rates = np.concatenate([np.atleast_1d(w.learning_rate) for w in records])
    np.testing.assert_array_equal(rates, np.float32([0.5] * 2 + [0.05] * 11 + [0.005] * 7))
    losses = np.concatenate([w.loss for w in records])
    # The loss of the epoch is the mean over images, not over steps.
    sizes = [7] * 9 + [1]
    for epoch in range(2):
        mean = np.average(losses[10 * epoch : 10 * (epoch + 1)], weights=sizes)
        assert records[3 * epoch + 2].logs["loss"] == pytest.approx(mean, rel=1e-5)
    for record in records:
        assert record.metrics["accuracy"].shape == (record.steps,)
        assert record.metrics["accuracy"][-1] == pytest.approx(record.logs["accuracy"])


def test_each_recorded_rate_is_the_one_that_moved_the_weights(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    # Rate 0 in the first and the last step, so their weights must not move.
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 2], [0.0, 0.5, 0.0])
    model = compiled_model(one_device, optimizer=lambda: keras.optimizers.SGD(schedule))
    weights = [model.get_weights()]
    records: list[CallRecord] = []
    callback = at_call_end(records.append, lambda _: weights.append(model.get_weights()))
    train = batches_of(tiny.train, one_device, 8, limit_batches=4)
    Loop(model, one_device, steps_per_execution=1).fit(train, epochs=1, callbacks=[callback])
    moved = [
        any((a != b).any() for a, b in zip(x, y, strict=True))
        for x, y in itertools.pairwise(weights)
    ]
    assert moved == [False, True, True, False]
    assert [bool(np.any(w.learning_rate)) for w in records] == moved


def test_stop_flag_of_a_callback_ends_the_epoch(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    class StopAtOnce(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            self.model.stop_training = batch >= 3

    records: list[CallRecord] = []
    loop = Loop(compiled_model(one_device), one_device, steps_per_execution=2)
    history = loop.fit(
        batches_of(tiny.train, one_device, 8),
        epochs=3,
        callbacks=[StopAtOnce(), at_call_end(records.append)],
    )
    assert [w.first_step for w in records] == [0, 2]
    assert len(history["loss"]) == 1


@pytest.fixture(scope="module")
def trained(tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any) -> Any:
    """A loop whose model has seen one epoch."""
    loop = Loop(compiled_model(one_device, regularizer="l2"), one_device, steps_per_execution=3)
    loop.fit(batches_of(tiny.train, one_device, 8), epochs=1)
    return loop


def test_evaluate_scores_every_image_in_order_as_keras_does(
    trained: Any, tiny: Any, batches_of: Make, one_device: Any
) -> None:
    images, labels = tiny.train.read()
    train = batches_of(tiny.train, one_device, 7)  # the last batch has one image
    scores, probabilities = trained.evaluate(train, collect=True)
    assert probabilities.shape == (64, 3)
    np.testing.assert_allclose(
        probabilities, trained.model.predict(images, batch_size=7, verbose=0), rtol=1e-6, atol=1e-8
    )
    hits = probabilities.argmax(axis=1) == labels
    assert scores["accuracy"] == pytest.approx(hits.sum() / 64, rel=1e-6)
    expected = trained.model.evaluate(images, labels, batch_size=7, verbose=0, return_dict=True)
    assert scores == pytest.approx(expected, rel=1e-6)
    # The loss is the loss of the collected probabilities plus the regularizer.
    bare = -np.log(probabilities[np.arange(64), labels]).mean()
    penalty = float(tf.add_n(trained.model.losses))
    assert penalty > 0.01
    assert scores["loss"] == pytest.approx(bare + penalty, rel=1e-5)

    streamed = batches_of(tiny.train, one_device, 7, placement="stream")
    again, the_same = trained.evaluate(streamed, collect=True)
    assert again == scores
    np.testing.assert_array_equal(the_same, probabilities)


def test_evaluate_collects_also_after_it_did_not(
    trained: Any, tiny: Any, batches_of: Make, one_device: Any
) -> None:
    test = batches_of(tiny.test, one_device, 5)
    scores, nothing = trained.evaluate(test)
    assert nothing is None
    again, probabilities = trained.evaluate(test, collect=True)
    assert again == scores
    assert probabilities.shape == (17, 3)


def test_evaluate_on_two_devices_equals_one(
    trained: Any,
    tiny: Any,
    compiled_model: Make,
    batches_of: Make,
    one_device: Any,
    two_devices: Any,
) -> None:
    model = compiled_model(two_devices, regularizer="l2")
    model.set_weights(trained.model.get_weights())
    scores, probabilities = Loop(model, two_devices, steps_per_execution=3).evaluate(
        batches_of(tiny.train, two_devices, 7), collect=True
    )
    expected, wanted = trained.evaluate(batches_of(tiny.train, one_device, 7), collect=True)
    assert scores == pytest.approx(expected, rel=1e-6)
    assert probabilities.shape == wanted.shape
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-6, atol=1e-8)


def test_compiled_by_xla_trains_the_same(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    ends = []
    for jit_compile in (False, True):
        model = compiled_model(one_device)
        train = batches_of(tiny.train, one_device, 21, seed=1)  # 21, 21, 21 and 1
        history = Loop(model, one_device, jit_compile=jit_compile).fit(train, epochs=2)
        ends.append((model.get_weights(), history))
    assert ends[1][1]["loss"] == pytest.approx(ends[0][1]["loss"], rel=1e-5)
    assert ends[1][1]["loss"][1] < ends[1][1]["loss"][0]
    for a, b in zip(ends[0][0], ends[1][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def golden_run() -> Iterator[float]:
    """Yields the losses of 20 steps of the convolutional network, from fixed seeds."""
    from trainer import devices

    config = DataConfig(
        name="synthetic", options={"examples": 200, "height": 12, "width": 12, "classes": 4}
    )
    dataset, chosen = load(config), devices.select("cpu")
    with devices.dtype_policy("float32"), chosen.scope():
        keras.utils.set_random_seed(1)
        options = {"filters": [4], "kernel_size": 3, "dense": 16}
        model = build(ModelConfig(name="cnn", options=options), dataset.spec)
        model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    train = make_batches(dataset.train, config, chosen, batch_size=15, seed=1)
    records: list[CallRecord] = []
    Loop(model, chosen).fit(train, epochs=2, callbacks=[at_call_end(records.append)])
    for record in records:
        yield from record.loss.tolist()


# A change that should not change results leaves these numbers. To update them after another one:
# `python -m pytest tests/training/test_loop.py -k golden` shows the losses found, as a list.
GOLDEN = [
    1.40871, 1.33532, 1.42997, 1.40914, 1.4052, 1.38236, 1.37768, 1.35827, 1.388, 1.33178,
    1.37304, 1.29034, 1.3273, 1.34864, 1.24754, 1.29038, 1.40401, 1.31257, 1.13711, 1.17929,
]  # fmt: skip


def test_golden_loss_curve() -> None:
    losses = list(golden_run())
    assert losses == pytest.approx(GOLDEN, rel=1e-3), str([round(loss, 5) for loss in losses])


REPEAT = """
import sys
import numpy as np, keras, tensorflow as tf
import trainer
from trainer.config import Config

config = Config().with_changes({
    "data.name": "synthetic",
    "data.options": {"examples": 64, "height": 6, "width": 6, "classes": 3},
    "model.name": "mlp", "model.options": {"units": [4]}, "training.batch_size": 8,
    "training.epochs": 1, "logging.tensorboard": False, "logging.directory": sys.argv[1],
})
model = trainer.fit(config).model
images, labels = np.zeros((40, 6, 6, 1), np.uint8), np.zeros(40, np.int64)
expected = model.evaluate(images, labels, batch_size=7, verbose=0)
for _ in range(int(sys.argv[2])):
    assert model.evaluate(images, labels, batch_size=7, verbose=0) == expected
model.fit(images, labels, batch_size=7, epochs=2, verbose=0)
print("done")
"""


@pytest.mark.slow
def test_keras_own_methods_of_a_fitted_model_do_not_crash_under_load(tmp_path: Path) -> None:
    """A model that was built in a strategy's scope could crash the process here."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        command = [sys.executable, "-X", "faulthandler", "-c", REPEAT, str(tmp_path), "60"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["done"]), done.stderr[-3000:]
