"""Our step compared to Keras's, and several devices compared to one."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_loop import at_call_end

from trainer.training import step
from trainer.training.loop import CallRecord, Loop

Make = Callable[..., Any]


def some_batches(split: Any, sizes: list[int]) -> Iterator[tuple[Any, Any, Any]]:
    """Yields images, labels and sample weights of batches, again from the start after the end."""
    images, labels = split.read()
    weights = np.random.RandomState(1).uniform(0, 2, len(labels)).astype(np.float32)
    first = 0
    for size in sizes:
        rows = np.arange(first, first + size) % len(labels)
        first += size
        yield tf.constant(images[rows]), tf.constant(labels[rows]), tf.constant(weights[rows])


def ours(model: keras.Model, *data: Any, **options: Any) -> dict[str, Any]:
    """Our step; returns the logs as Keras's does."""
    step.train_step(model, *data, **options)
    return model.get_metrics_result()


def keras_own(model: keras.Model, *data: Any) -> dict[str, Any]:
    """Keras's own step."""
    return model.train_step(data)


def run_steps(
    train_step: Callable[..., Any],
    model: keras.Model,
    batches: list[tuple[Any, ...]],
    reset: int | None = None,
) -> list[dict[str, float]]:
    """Runs a step on each batch inside one tf.function; returns the logs after each.

    Metrics are reset before every `reset`-th batch.
    """
    model.optimizer.build(model.trainable_variables)
    shapes = [tf.TensorSpec((None, *t.shape[1:]), t.dtype) for t in batches[0]]

    @tf.function(input_signature=shapes)
    def call(*data: Any) -> dict[str, Any]:
        return train_step(model, *data)

    logs = []
    for i, data in enumerate(batches):
        if reset and i % reset == 0:
            model.reset_metrics()
        with tf.device("CPU:0"):
            logs.append({name: float(value) for name, value in call(*data).items()})
    return logs


CASES: dict[str, tuple[dict[str, Any], list[int], bool]] = {
    # name: (options of the model, batch sizes, with sample weights)
    "plain": ({"optimizer": lambda: keras.optimizers.Adam(0.01)}, [8] * 20, False),
    "sample_weights": ({"weighted_metrics": ["accuracy"], "metrics": ()}, [8] * 20, True),
    "regularizer": ({"regularizer": "l2"}, [8] * 20, False),
    "ragged": ({}, ([8] * 4 + [3]) * 4, False),
    "mixed_float16": ({"policy": "mixed_float16"}, [8] * 20, False),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_keras_own(case: str, tiny: Any, compiled_model: Make) -> None:
    options, sizes, weighted = CASES[case]
    batches = [data if weighted else data[:2] for data in some_batches(tiny.train, sizes)]
    models = [compiled_model(**options) for _ in range(2)]
    before = models[0].get_weights()
    logs = run_steps(ours, models[0], batches)
    expected = run_steps(keras_own, models[1], batches)

    # The same operations in the same order on the same device: not one bit differs.
    assert logs == expected
    for found, wanted in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in zip(
        models[0].optimizer.variables, models[1].optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy(), err_msg=found.path)
    assert int(models[0].optimizer.iterations.numpy()) == 20
    # The weights have changed: the models did not agree only because nothing happened.
    assert all((a != b).any() for a, b in zip(before, models[0].get_weights(), strict=True))


def test_sample_weights_count(tiny: Any, compiled_model: Make) -> None:
    images, labels, _ = next(some_batches(tiny.train, [8]))
    model = compiled_model(metrics=(), weighted_metrics=["accuracy"])
    probabilities = model(images).numpy()
    weights = np.array([0, 0, 0, 1, 2, 3, 0, 0], np.float32)
    logs = ours(model, images, labels, tf.constant(weights))
    each = -np.log(probabilities[np.arange(8), labels.numpy()])
    hits = probabilities.argmax(axis=1) == labels.numpy()
    assert float(logs["loss"]) == pytest.approx(float((each * weights).sum() / 8), rel=1e-5)
    assert float(logs["accuracy"]) == pytest.approx(float((hits * weights).sum() / 6), rel=1e-6)


@pytest.fixture(scope="module")
def keras_over_two_epochs(
    tiny: Any, compiled_model: Make
) -> tuple[list[dict[str, float]], list[Any]]:
    """Logs and weights of Keras's step over two epochs of ten batches, the last of one row."""
    model = compiled_model()
    batches = [data[:2] for data in some_batches(tiny.train, ([7] * 9 + [1]) * 2)]
    return run_steps(keras_own, model, batches, reset=10), model.get_weights()


@pytest.mark.parametrize("steps_per_execution", [1, 50])
def test_loop_equals_keras_own_step(
    steps_per_execution: int,
    tiny: Any,
    compiled_model: Make,
    batches_of: Make,
    one_device: Any,
    keras_over_two_epochs: tuple[list[dict[str, float]], list[Any]],
) -> None:
    expected, weights = keras_over_two_epochs
    model = compiled_model(one_device)
    loop = Loop(model, one_device, steps_per_execution=steps_per_execution)
    records: list[CallRecord] = []
    loop.fit(
        batches_of(tiny.train, one_device, 7), epochs=2, callbacks=[at_call_end(records.append)]
    )
    assert len(records) == (20 if steps_per_execution == 1 else 2)
    for record in records:
        wanted = expected[record.first_step + record.steps - 1]
        assert record.logs == pytest.approx(wanted, rel=1e-6)
    for found, wanted in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def true_gradients(model: keras.Model, images: Any, labels: Any, scale: float) -> list[Any]:
    """Returns the gradients of the loss, computed by the test itself."""
    with tf.GradientTape() as tape:
        outputs = model(images, training=True)
        loss = model.compute_loss(images, labels, outputs, None, training=True) * scale
    return [g / scale for g in tape.gradient(loss, model.trainable_variables)]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("clip_norm", [0.01, 100.0])
def test_clip_norm_clips_true_gradients(
    clip_norm: float, policy: str, tiny: Any, compiled_model: Make
) -> None:
    # With plain descent at rate 1, the weights move by exactly the clipped gradient.
    model = compiled_model(policy=policy, optimizer=lambda: keras.optimizers.SGD(1.0))
    model.optimizer.build(model.trainable_variables)
    images, labels, _ = next(some_batches(tiny.train, [8]))
    gradients = true_gradients(model, images, labels, 1.0 if policy == "float32" else 2.0**15)
    norm = float(tf.linalg.global_norm(gradients))
    assert 0.01 < norm < 100
    expected, _ = tf.clip_by_global_norm(gradients, clip_norm)
    before = model.get_weights()
    result = step.train_step(model, images, labels, clip_norm=clip_norm, gradient_norms=True)
    moved = [b - a for b, a in zip(before, model.get_weights(), strict=True)]

    for found, wanted in zip(moved, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-7)
    length = np.sqrt(sum((m**2).sum() for m in moved))
    assert length == pytest.approx(min(norm, clip_norm), rel=1e-3)
    # The norms are those before clipping and without the scale.
    np.testing.assert_allclose(result["gradient_norms"], [tf.norm(g) for g in gradients], rtol=1e-5)


def test_a_weight_that_changes_nothing_has_the_norm_zero(tiny: Any, compiled_model: Make) -> None:
    class Idle(keras.layers.Layer):
        """Has a weight that it does not use."""

        def build(self, shape: Any) -> None:  # noqa: ARG002
            self.idle = self.add_weight(shape=(2,), name="idle")

        def call(self, x: Any) -> Any:
            return x

    model = compiled_model(own_layers=lambda: [Idle()])
    model.optimizer.build(model.trainable_variables)
    images, labels, _ = next(some_batches(tiny.train, [8]))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        norms = step.train_step(model, images, labels, gradient_norms=True)["gradient_norms"]
    idle = [weight.name == "idle" for weight in model.trainable_variables]
    assert (norms.numpy() == 0).tolist() == idle
    assert sum(idle) == 1


def test_clip_norm_knows_the_scale_of_any_optimizer(tiny: Any, compiled_model: Make) -> None:
    # Any Keras optimizer takes `loss_scale_factor`, float16 or not.
    images, labels, _ = next(some_batches(tiny.train, [8]))
    results = []
    for factor in (None, 1024.0):
        model = compiled_model(
            optimizer=lambda f=factor: keras.optimizers.SGD(1.0, loss_scale_factor=f)
        )
        model.optimizer.build(model.trainable_variables)
        norms = step.train_step(model, images, labels, clip_norm=0.01, gradient_norms=True)
        results.append((norms["gradient_norms"].numpy(), model.get_weights()))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    for found, wanted in zip(results[1][1], results[0][1], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_mixed_float16_keeps_gradients_too_small_for_float16(
    tiny: Any, compiled_model: Make
) -> None:
    # The smallest float16 is 6e-8: without scaling, most of these gradients would be zero. Scaled
    # only in the optimizer, all would be 2**15 times too small.
    images, labels, _ = next(some_batches(tiny.train, [8]))
    small = 1e-7
    model = compiled_model(
        policy="mixed_float16",
        loss_weights=[small],
        optimizer=lambda: keras.optimizers.SGD(1 / small),
    )
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.optimizer.build(model.trainable_variables)
    reference = compiled_model()
    expected = true_gradients(reference, images, labels, 1.0)
    before = model.get_weights()
    part = step.train_step(model, images, labels)["loss"]
    assert float(part) / small == pytest.approx(
        float(reference.compute_loss(images, labels, reference(images))), rel=1e-2
    )
    for a, b, wanted in zip(before, model.get_weights(), expected, strict=True):
        size = float(tf.norm(wanted))
        assert np.linalg.norm((a - b) - wanted.numpy()) < 0.01 * size


MIRRORED: dict[str, tuple[dict[str, Any], dict[str, Any], str, float]] = {
    # name: (options of the model, of the loop, placement, relative tolerance)
    "plain": ({"regularizer": "l2"}, {}, "device", 1e-5),
    "clip_norm": ({}, {"clip_norm": 1.0, "gradient_norms": True}, "stream", 1e-5),
    # In float16, which has 11 bits, half a batch is rounded differently.
    "mixed_float16": ({"policy": "mixed_float16"}, {"clip_norm": 1.0}, "device", 5e-3),
}


@pytest.mark.parametrize("case", MIRRORED)
def test_two_devices_equal_one_on_the_same_batches(
    case: str,
    tiny: Any,
    compiled_model: Make,
    batches_of: Make,
    one_device: Any,
    two_devices: Any,
) -> None:
    model_options, loop_options, placement, tolerance = MIRRORED[case]
    results = []
    for chosen in (one_device, two_devices):
        model = compiled_model(chosen, **model_options)
        loop = Loop(model, chosen, steps_per_execution=5, **loop_options)
        # 64 rows: nine batches of 7 (3 rows and 4), then one of a single row (none and 1).
        train = batches_of(tiny.train, chosen, 7, placement=placement, seed=3)
        records: list[CallRecord] = []
        loop.fit(train, epochs=2, callbacks=[at_call_end(records.append)])
        assert int(model.optimizer.iterations.numpy()) == 20
        results.append((model.get_weights(), records))
    (wanted_weights, wanted_records), (weights, records) = results

    for found, wanted in zip(weights, wanted_weights, strict=True):
        np.testing.assert_allclose(
            found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
        )
    for found, wanted in zip(records, wanted_records, strict=True):
        assert found.images == wanted.images
        assert found.logs == pytest.approx(wanted.logs, rel=tolerance)
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=tolerance)
        if "gradient_norms" in loop_options:
            np.testing.assert_allclose(found.gradient_norms, wanted.gradient_norms, rtol=1e-4)


def test_replicas_hold_equal_weights_and_skip_an_overflow_together(
    tiny: Any, compiled_model: Make, batches_of: Make, two_devices: Any
) -> None:
    # Rows of label 2 have a loss that float16 cannot hold once it is scaled. In the order below
    # they are all in the second half of the batch: one replica overflows, the other does not.
    def loss(labels: Any, outputs: Any) -> Any:
        each = keras.losses.sparse_categorical_crossentropy(labels, outputs)
        return each * tf.where(tf.reshape(labels, tf.shape(each)) == 2, 1e6, 1.0)

    order = np.argsort(tiny.train.labels[tiny.train.rows] == 2, kind="stable")
    split = type(tiny.train)(
        tiny.train.images, tiny.train.labels, tiny.train.rows[order][[0, 1, -2, -1]]
    )
    assert [label == 2 for label in split.labels[split.rows]] == [False, False, True, True]
    model = compiled_model(two_devices, policy="mixed_float16", loss=loss)
    before = model.get_weights()
    Loop(model, two_devices).fit(batches_of(split, two_devices, 4), epochs=1)

    for variable, former in zip(model.trainable_variables, before, strict=True):
        values = two_devices.strategy.experimental_local_results(variable.value)
        copies = [value.numpy() for value in values]
        assert len(copies) == 2
        for copy in copies:
            np.testing.assert_array_equal(copy, former)
    assert float(model.optimizer.dynamic_scale.numpy()) == 2.0**14
