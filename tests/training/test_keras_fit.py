"""`Loop.fit` compared to Keras's `Model.fit`: hooks, logs, weights. See docs/keras_fit.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_loop import Recorder, at_call_end, compare_histories, compare_weights, keras_fit

from trainer.errors import InputError
from trainer.training.averaging import AveragedWeights
from trainer.training.callbacks import MetricsFile, TensorBoardCurves
from trainer.training.loop import CallRecord, Loop

Make = Callable[..., Any]
EPOCHS = 3

HOOKS = (
    *("on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"),
    *("on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end", "on_epoch_end"),
)


class Act(keras.callbacks.Callback):
    """Does something when a hook is called for the n-th time."""

    def __init__(self, hook: str, action: Callable[[keras.Model], None], *, call: int = 1) -> None:
        super().__init__()
        self.left = call

        def method(*_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left == 0:
                action(self.model)

        setattr(self, hook, method)


@pytest.fixture
def pair(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> Callable[..., Callable[..., tuple[Any, Any]]]:
    """Makes two equal models: one is trained by Keras's fit and one by our loop.

    Args of the result: what makes the models, and its options. It returns a function that trains
    both with the callbacks that it gets, and compares everything. It can be called several times.
    """

    def make(
        model: Callable[..., Any] = compiled_model, *, steps_per_execution: int = 4, **options: Any
    ) -> Callable[..., tuple[Any, Any]]:
        theirs, ours = model(**options), model(one_device, **options)
        loop = Loop(ours, one_device, steps_per_execution=steps_per_execution)
        train, test = batches_of(tiny.train, one_device, 8), batches_of(tiny.test, one_device, 5)

        def fit(
            callbacks: Callable[[], list[Any]] = list,
            *,
            keras_callbacks: Callable[[], list[Any]] | None = None,
        ) -> tuple[Any, Any]:
            recorders = Recorder(), Recorder()
            wanted = keras_fit(
                *(theirs, tiny),
                epochs=EPOCHS,
                callbacks=[*(keras_callbacks or callbacks)(), recorders[0]],
                steps_per_execution=steps_per_execution,
            )
            found = loop.fit(train, test, epochs=EPOCHS, callbacks=[*callbacks(), recorders[1]])
            assert recorders[1].calls == recorders[0].calls
            compare_histories(found, wanted)
            compare_weights(ours, theirs)
            return ours, theirs

        return fit

    return make


@pytest.fixture
def both(pair: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Trains equal models once, with some callbacks, in both ways."""

    def run(
        callbacks: Callable[[], list[Any]] = list,
        *model: Callable[..., Any],
        keras_callbacks: Callable[[], list[Any]] | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        return pair(*model, **options)(callbacks, keras_callbacks=keras_callbacks)

    return run


def test_stop_flags_set_in_each_hook(pair: Callable[..., Any]) -> None:
    def stop_training(model: keras.Model) -> None:
        model.stop_training = True

    def stop_evaluating(model: keras.Model) -> None:
        model.stop_evaluating = True

    fit = pair(steps_per_execution=2)
    for hook in HOOKS:
        fit(lambda hook=hook: [Act(hook, stop_training)])
    for hook in ("on_test_begin", "on_test_batch_begin", "on_test_batch_end"):
        fit(lambda hook=hook: [Act(hook, stop_evaluating)])


def test_learning_rate_and_weights_changed_in_each_hook(both: Callable[..., Any]) -> None:
    def change(rate: float) -> Callable[[keras.Model], None]:
        def assign(model: keras.Model) -> None:
            model.optimizer.learning_rate = rate
            kernel = model.trainable_variables[0]
            kernel.assign(kernel * (1 - rate))

        return assign

    both(lambda: [Act(hook, change(0.2 - 0.01 * i)) for i, hook in enumerate(HOOKS)])


class Adds(keras.callbacks.Callback):
    """Adds a log that another callback monitors."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_own"] = float(epoch)


def test_logs_that_a_callback_adds_reach_history_and_early_stopping(
    both: Callable[..., Any],
) -> None:
    ours, _ = both(
        lambda: [Adds(), keras.callbacks.EarlyStopping("val_own", mode="min", patience=1)]
    )
    assert ours.history.history["val_own"] == [0.0, 1.0]


def freeze(model: keras.Model) -> None:
    model.layers[3].trainable = False
    model.make_train_function(force=True)


def assign_schedule(model: keras.Model) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.3, 3, 0.5)
    model.optimizer.learning_rate = schedule
    model.make_train_function(force=True)


def recompile(model: keras.Model) -> None:
    model.compile(
        keras.optimizers.Adam(0.05),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=4,
        jit_compile=False,
    )
    model.make_train_function()
    model.make_test_function()


def new_step(model: keras.Model) -> None:
    model.layers[3].activation = keras.activations.tanh
    model.make_train_function(force=True)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin"])
@pytest.mark.parametrize("change", [freeze, assign_schedule, recompile, new_step])
def test_changes_of_what_is_traced(
    change: Callable[[Any], None], hook: str, call: int, both: Callable[..., Any]
) -> None:
    if hook == "on_train_begin" and call == 2:
        pytest.skip("it is called once")
    both(lambda: [Act(hook, change, call=call)])


def test_freezing_needs_no_new_function(both: Callable[..., Any]) -> None:
    """Keras ignores a frozen layer until `make_train_function`; the loop does not."""

    def without_force(model: keras.Model) -> None:
        model.layers[3].trainable = False

    both(
        lambda: [Act("on_epoch_begin", without_force, call=2)],
        keras_callbacks=lambda: [Act("on_epoch_begin", freeze, call=2)],
    )


class Constant(keras.metrics.Metric):
    """A metric without variables."""

    def update_state(self, *_: Any, **__: Any) -> None:
        pass

    def result(self) -> Any:
        return 3.0


def test_tracing_again_within_an_epoch_leaves_its_metrics(both: Callable[..., Any]) -> None:
    both(
        lambda: [Act("on_train_batch_begin", freeze, call=4)],
        metrics=["accuracy", Constant(name="constant")],
    )


class Results(keras.metrics.Metric):
    """Returns its count in several forms."""

    def __init__(self, form: str) -> None:
        super().__init__(name=form)
        self.form = form
        self.count = self.add_weight(shape=(), initializer="zeros", name="count")

    def update_state(self, labels: Any, outputs: Any, sample_weight: Any = None) -> None:  # noqa: ARG002
        self.count.assign_add(keras.ops.cast(keras.ops.shape(outputs)[0], "float32"))

    def result(self) -> Any:
        count = self.count + 0.0
        if self.form == "dictionary":
            return {"one": count, "two": 2 * count}
        return 7 if self.form == "number" else count


class Lists(Results):
    def result(self) -> Any:
        return [self.count, self.count * 2.0]


class Stacked(Results):
    def result(self) -> Any:
        return keras.ops.stack([self.count + 0.0, self.count * 2.0])


def test_metrics_of_several_forms(both: Callable[..., Any]) -> None:
    forms = ["dictionary", "number", "tensor"]
    ours, _ = both(metrics=["accuracy", *(Results(form) for form in forms)])
    last = {"one": 64.0, "two": 128.0, "number": 7.0, "tensor": 64.0}
    for name, value in last.items():
        assert ours.history.history[name] == [value] * EPOCHS


def test_several_results_are_an_array(
    compiled_model: Make, batches_of: Make, tiny: Any, one_device: Any
) -> None:
    model = compiled_model(one_device, metrics=[Lists("several"), Stacked("stacked")])
    records: list[CallRecord] = []
    history = Loop(model, one_device).fit(
        batches_of(tiny.train, one_device, 32), epochs=1, callbacks=[at_call_end(records.append)]
    )
    np.testing.assert_array_equal(history["several"][0], [64, 128])
    np.testing.assert_array_equal(history["stacked"][0], [64, 128])
    assert records[0].metrics.keys() == set()  # curves are of single numbers


class OwnStep(keras.Model):
    """Keras's guide: a train_step and a test_step with metrics of their own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tracker = keras.metrics.Mean(name="loss")
        self.error = keras.metrics.Mean(name="error")

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker, self.error]

    def _update(self, labels: Any, outputs: Any) -> tuple[Any, dict[str, Any]]:
        wanted = keras.ops.one_hot(keras.ops.cast(labels, "int32"), 3)
        loss = keras.ops.mean(keras.ops.square(wanted - outputs))
        self.tracker.update_state(loss)
        self.error.update_state(keras.ops.abs(wanted - outputs))
        return loss, {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data: Any) -> dict[str, Any]:
        images, labels = data
        with tf.GradientTape() as tape:
            loss, logs = self._update(labels, self(images, training=True))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        return logs

    def test_step(self, data: Any) -> dict[str, Any]:
        images, labels = data
        return self._update(labels, self(images, training=False))[1]


class OwnLogs(OwnStep):
    """Its logs are not the results of its metrics."""

    def train_step(self, data: Any) -> dict[str, Any]:
        logs = super().train_step(data)
        return {"loss": logs["loss"], "last_rows": tf.shape(data[1])[0]}

    def test_step(self, data: Any) -> dict[str, Any]:
        return {"loss": super().test_step(data)["loss"], "last_rows": tf.shape(data[1])[0]}


class OwnMetrics(keras.Model):
    """Its compute_metrics returns one key more, and its compute_loss takes no `training`."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return results | {"largest": keras.ops.max(y_pred)}

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return 2.0 * super().compute_loss(x, y, y_pred, sample_weight)


def of_class(kind: type[keras.Model], compiled_model: Make) -> Make:
    """Makes the models of `compiled_model` of another class."""

    def make(chosen: Any = None, **options: Any) -> keras.Model:
        plain = compiled_model(chosen, **options)
        with chosen.scope() if chosen else tf.device(None):
            model = kind(plain.inputs, plain.outputs[0])
            model.compile(
                keras.optimizers.SGD(0.05, momentum=0.9),
                "sparse_categorical_crossentropy",
                metrics=["accuracy"],
                jit_compile=False,
            )
        return model

    return make


@pytest.mark.parametrize("kind", [OwnStep, OwnLogs, OwnMetrics])
def test_steps_losses_and_metrics_of_a_models_own(
    kind: type[keras.Model], both: Callable[..., Any], compiled_model: Make
) -> None:
    ours, _ = both(list, of_class(kind, compiled_model))
    if kind is OwnLogs:
        assert ours.history.history["val_last_rows"] == [2.0] * EPOCHS  # 17 = 5 + 5 + 5 + 2


def test_a_step_of_a_models_own_is_recorded_step_by_step(
    compiled_model: Make, batches_of: Make, tiny: Any, one_device: Any
) -> None:
    model = of_class(OwnStep, compiled_model)(one_device)
    loop = Loop(model, one_device, gradient_norms=True)
    records: list[CallRecord] = []
    loop.fit(
        batches_of(tiny.train, one_device, 8), epochs=1, callbacks=[at_call_end(records.append)]
    )
    (record,) = records
    assert record.loss.shape == record.metrics["error"].shape == (8,)
    assert record.gradient_norms is None
    assert len(set(record.loss.tolist())) == 8
    scores, probabilities = loop.evaluate(batches_of(tiny.test, one_device, 5), collect=True)
    images, labels = tiny.test.read()
    wanted = np.eye(3)[labels]
    np.testing.assert_allclose(probabilities, model.predict(images, verbose=0), rtol=1e-5)
    assert scores["error"] == pytest.approx(np.abs(wanted - probabilities).mean(), rel=1e-5)


def test_what_a_step_of_a_models_own_must_be(
    compiled_model: Make, batches_of: Make, tiny: Any, one_device: Any
) -> None:
    class NoLoss(OwnStep):
        def train_step(self, data: Any) -> dict[str, Any]:
            return {"error": super().train_step(data)["error"]}

    model = of_class(NoLoss, compiled_model)(one_device)
    with pytest.raises(InputError, match=r"clip_norm: train_step has no parameter clip_norm"):
        Loop(model, one_device, clip_norm=1.0)
    with pytest.raises(
        InputError, match=r"train_step: expected a dictionary of logs with 'loss' .*, received e"
    ):
        Loop(model, one_device).fit(batches_of(tiny.train, one_device, 8), epochs=1)


def mean_of_all(labels: Any, outputs: Any) -> Any:
    return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, outputs))


def each_image(labels: Any, outputs: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, outputs)


class ScalarLoss(keras.losses.Loss):
    def call(self, labels: Any, outputs: Any) -> Any:
        return mean_of_all(labels, outputs)


class OwnLoss(keras.Model):
    def compute_loss(self, x: Any, y: Any, y_pred: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        return mean_of_all(y, y_pred)


class AddsSum(keras.layers.Layer):
    """Adds a loss that grows with the batch."""

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * keras.ops.sum(x))
        return x


def test_what_cannot_be_added_up_is_refused_on_several_devices(
    compiled_model: Make, one_device: Any, two_devices: Any, batches_of: Make, tiny: Any
) -> None:
    summed = keras.losses.SparseCategoricalCrossentropy(reduction="sum")

    def overwriting() -> Any:
        return keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=4)

    own = [of_class(kind, compiled_model) for kind in (OwnStep, OwnMetrics, OwnLoss)]
    cases = [
        *((make, {}, r"a model with its own \w+") for make in own),
        *(
            (
                compiled_model,
                {"loss": loss},
                "one value for each image and a reduction to their mean",
            )
            for loss in (mean_of_all, ScalarLoss(), summed)
        ),
        (compiled_model, {"own_layers": lambda: [AddsSum()]}, "a layer that adds a loss"),
        (compiled_model, {"optimizer": overwriting}, "ema_overwrite_frequency"),
    ]
    for make, options, message in cases:
        Loop(make(one_device, **options), one_device)
        with pytest.raises(InputError, match=f"{message}: expected one device, received several"):
            Loop(make(two_devices, **options), two_devices)

    def compile_again(model: keras.Model) -> None:
        with two_devices.scope():
            model.compile("sgd", mean_of_all, metrics=["accuracy"], jit_compile=False)

    with pytest.raises(InputError, match="to their mean"):
        Loop(compiled_model(two_devices), two_devices).fit(
            batches_of(tiny.train, two_devices, 8),
            epochs=2,
            callbacks=[Act("on_epoch_begin", compile_again, call=2)],
        )


def test_a_function_of_each_image_is_the_same_on_several_devices(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any, two_devices: Any
) -> None:
    losses = []
    for chosen in (one_device, two_devices):
        model = compiled_model(chosen, loss=each_image, regularizer="l2")
        train = batches_of(tiny.train, chosen, 7)
        losses.append(Loop(model, chosen).fit(train, epochs=1)["loss"][0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_several_optimizers_in_one(
    both: Callable[..., Any],
    tiny: Any,
    compiled_model: Make,
    batches_of: Make,
    one_device: Any,
    tmp_path: Path,
) -> None:
    def two() -> Any:
        optimizers = [keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01)]
        return keras.optimizers.MultiOptimizer(lambda v: optimizers["kernel" in v.path])

    both(optimizer=two)
    model = compiled_model(one_device, optimizer=two)
    records: list[CallRecord] = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    curves = TensorBoardCurves(tmp_path, histograms=False)
    Loop(model, one_device).fit(
        batches_of(tiny.train, one_device, 8),
        epochs=1,
        callbacks=[metrics, curves, at_call_end(records.append)],
    )
    assert np.isnan(records[0].learning_rate).all()  # there is not one rate
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["learning_rate"] is None
    assert line["loss"] > 0


@pytest.mark.parametrize("best", [True, False])
def test_averaged_weights_are_scored_and_kept(
    best: bool, tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any, tmp_path: Path
) -> None:
    """Every copy has the weights that the validation of its epoch scored."""
    model = compiled_model(
        one_device, optimizer=lambda: keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)
    )
    averaging = AveragedWeights()
    path = tmp_path / "{epoch}.weights.h5"
    keeps = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    # The second epoch counts as the best one, the third ends the training of six.
    stop = keras.callbacks.EarlyStopping(
        "val_own", mode="min", patience=2, restore_best_weights=best
    )
    scores: list[float] = []

    class Own(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            scores.append(logs["val_loss"])
            logs["val_own"] = abs(epoch - 1.0)

    loop, test = Loop(model, one_device), batches_of(tiny.test, one_device, 5)
    loop.fit(
        batches_of(tiny.train, one_device, 8),
        test,
        epochs=6,
        callbacks=[averaging, Own(), keeps, stop],
    )
    assert len(scores) == 4
    kept = scores[1] if best else scores[-1]
    assert loop.evaluate(test)[0]["loss"] == pytest.approx(kept, rel=1e-6)
    for epoch, score in enumerate(scores, 1):
        model.load_weights(tmp_path / f"{epoch}.weights.h5")
        assert loop.evaluate(test)[0]["loss"] == pytest.approx(score, rel=1e-6)


def test_averaging_changes_nothing_in_the_training_itself(
    tiny: Any, compiled_model: Make, batches_of: Make, one_device: Any
) -> None:
    losses = []
    for callbacks in ([], [AveragedWeights()]):
        model = compiled_model(
            one_device, optimizer=lambda: keras.optimizers.Adam(0.05, use_ema=True)
        )
        history = Loop(model, one_device).fit(
            batches_of(tiny.train, one_device, 8),
            batches_of(tiny.test, one_device, 5),
            epochs=3,
            callbacks=callbacks,
        )
        losses.append((history["loss"], model.get_weights()))
    assert losses[0][0] == losses[1][0]
    for one, other in zip(losses[0][1], losses[1][1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [OwnLogs, OwnMetrics])
def test_a_workflow_runs_a_models_own_methods(
    kind: type[keras.Model], in_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From building the experiment to the report and the evaluation of the run."""
    import trainer
    from trainer import models
    from trainer.models import mlp

    def build(spec: Any) -> keras.Model:
        plain = mlp.build(spec, units=(4,), dropout=0.0)
        return kind(plain.inputs[0], plain.outputs[0])

    monkeypatch.setattr(models, "find", lambda _: build)
    config = trainer.Config().with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 100, "height": 6, "width": 6, "classes": 3},
            "training.epochs": 1,
            "training.batch_size": 20,
            "training.precision": "mixed_bfloat16",
        }
    )
    fitted = trainer.fit(config)
    assert fitted.run is not None
    again = trainer.evaluate(str(fitted.run.path))
    assert again["loss"] == pytest.approx(fitted.summary["test"]["loss"], rel=1e-6)
    assert (in_tmp_path / "runs").is_dir()


def test_a_step_that_is_assigned_to_a_model_is_used(
    compiled_model: Make, batches_of: Make, tiny: Any, one_device: Any
) -> None:
    model = compiled_model(one_device)
    model.train_step = lambda data: {"loss": 0.0 * tf.cast(data[1][0], tf.float32) + 5.0}
    history = Loop(model, one_device).fit(batches_of(tiny.train, one_device, 8), epochs=1)
    assert history == {"loss": [5.0]}


def test_frozen_batch_normalization_without_weights_keeps_its_averages(
    both: Callable[..., Any],
) -> None:
    def freeze_averages(model: keras.Model) -> None:
        model.get_layer("averages").trainable = False
        model.make_train_function(force=True)

    both(
        lambda: [Act("on_epoch_begin", freeze_averages, call=2)],
        own_layers=lambda: [
            keras.layers.BatchNormalization(center=False, scale=False, name="averages")
        ],
    )


def ema() -> Any:
    return keras.optimizers.SGD(0.2, use_ema=True, ema_momentum=0.5)


def test_weights_that_a_callback_assigns_stay_with_averaging(
    compiled_model: Make, batches_of: Make, tiny: Any, one_device: Any
) -> None:
    def zero(model: keras.Model) -> None:
        kernel = model.trainable_variables[0]
        kernel.assign(0.0 * kernel)

    seen: list[float] = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            seen.append(float(np.abs(self.model.get_weights()[0]).sum()))

    model = compiled_model(one_device, optimizer=ema)
    Loop(model, one_device).fit(
        batches_of(tiny.train, one_device, 8),
        batches_of(tiny.test, one_device, 5),
        epochs=2,
        callbacks=[AveragedWeights(), Act("on_epoch_end", zero), Looks()],
    )
    assert seen[0] > 0
    assert seen[1] == 0


def test_averaging_that_begins_in_a_callback(
    compiled_model: Make, batches_of: Make, tiny: Any, one_device: Any
) -> None:
    def compile_again(model: keras.Model) -> None:
        model.compile(ema(), "sparse_categorical_crossentropy", jit_compile=False)

    model = compiled_model(one_device)
    loop, test = Loop(model, one_device), batches_of(tiny.test, one_device, 5)
    history = loop.fit(
        batches_of(tiny.train, one_device, 8),
        test,
        epochs=3,
        callbacks=[AveragedWeights(), Act("on_epoch_begin", compile_again, call=2)],
    )
    assert loop.evaluate(test)[0]["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-6)


class OwnSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without get_config."""

    def __call__(self, step: Any) -> Any:
        return 0.1 / (1.0 + keras.ops.cast(step, "float32"))


def test_a_schedule_without_a_configuration_is_used(both: Callable[..., Any]) -> None:
    both(optimizer=lambda: keras.optimizers.SGD(OwnSchedule()))
