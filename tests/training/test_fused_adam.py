"""FusedAdam is Keras's Adam: same updates, same state, same file, under every strategy."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.training.fused_adam import FusedAdam

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "betas": {"beta_1": 0.7, "beta_2": 0.9, "epsilon": 1e-3},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.CosineDecay(
            0.0, 20, warmup_target=0.1, warmup_steps=3
        )
    },
    "weight decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5},
    "ema": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 5},
    "accumulation": {"gradient_accumulation_steps": 2},
}
SHAPES = ((3, 4), (4,), ())


def _train(optimizer: keras.optimizers.Optimizer, steps: int = 12) -> list[Any]:
    """Takes steps with the same random gradients, inside a graph, and returns weights and state."""
    generator = np.random.default_rng(0)
    weights = [keras.Variable(generator.normal(size=s).astype(np.float32)) for s in SHAPES]
    optimizer.build(weights)
    apply = tf.function(lambda gradients: optimizer.apply(gradients, weights))
    for _ in range(steps):
        apply([tf.constant(generator.normal(size=s), tf.float32) for s in SHAPES])
    return [np.array(v) for v in (*weights, *optimizer.variables)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_updates_equal_keras_own(options: dict[str, Any]) -> None:
    options = {"learning_rate": 0.05} | options
    expected, found = _train(keras.optimizers.Adam(**options)), _train(FusedAdam(**options))
    assert len(found) == len(expected)
    for theirs, ours in zip(expected, found, strict=True):
        # 1 - 0.999 has 14 bits left of float32's 24: an update of 0.05 is known to 3e-5 of it.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_of_an_embedding_are_updated() -> None:
    """The gradient of an embedding holds some of its rows only."""
    found = []
    for kind in (keras.optimizers.Adam, FusedAdam):
        table = keras.Variable(np.arange(12, dtype=np.float32).reshape(4, 3))
        optimizer = kind(0.1)
        for rows in ([1, 3], [0, 3], [1, 0]):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.gather(table.value, rows) ** 2)
            optimizer.apply([tape.gradient(loss, table.value)], [table])
        found.append(np.array(table))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_two_devices_take_the_steps_of_one(two_devices: Any) -> None:
    def train(strategy: tf.distribute.Strategy) -> list[Any]:
        with strategy.scope():
            weight, optimizer = keras.Variable([1.0, 2.0]), FusedAdam(0.1)
            optimizer.build([weight])

        def step() -> None:
            parts = strategy.num_replicas_in_sync
            optimizer.apply([tf.constant([0.5, -3.0]) / parts], [weight])

        run = tf.function(lambda: strategy.run(step))
        for _ in range(4):
            run()
        return [np.array(each) for each in (weight, *optimizer.variables)]

    expected = train(tf.distribute.OneDeviceStrategy("CPU:0"))
    found = train(two_devices.strategy)
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-6)


def test_a_saved_model_goes_on_as_it_would_have(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 16, 1)).astype(np.float32)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(FusedAdam(0.05, beta_2=0.9), loss="mse")
    model.fit(x, y, epochs=3, verbose=0, shuffle=False)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert isinstance(loaded.optimizer, FusedAdam)
    for each in (model, loaded):
        each.fit(x, y, epochs=2, verbose=0, shuffle=False)
    for expected, found in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_float16_is_scaled_as_under_keras() -> None:
    scaled = keras.optimizers.LossScaleOptimizer(FusedAdam(0.1), initial_scale=8.0)
    weight = keras.Variable(1.0)
    scaled.apply([tf.constant(8.0 * 0.5)], [weight])
    expected = keras.Variable(1.0)
    keras.optimizers.Adam(0.1).apply([tf.constant(0.5)], [expected])
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_amsgrad_is_refused() -> None:
    with pytest.raises(ValueError, match="amsgrad: expected False"):
        FusedAdam(amsgrad=True)
