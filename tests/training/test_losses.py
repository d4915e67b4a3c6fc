"""SmoothedCrossentropy is Keras's CategoricalCrossentropy with smoothing, for integer labels."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from trainer.training.losses import SmoothedCrossentropy

LABELS = np.array([0, 2, 1, 2, 0], np.int32)
OUTPUTS = np.random.default_rng(0).dirichlet(np.ones(3), 5).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None]], ids=["[n]", "[n, 1]"])
def test_it_equals_the_loss_of_keras_on_one_hot_labels(share: float, labels: Any) -> None:
    expected = keras.losses.CategoricalCrossentropy(label_smoothing=share)
    found = float(SmoothedCrossentropy(share)(labels, OUTPUTS))
    assert found == pytest.approx(float(expected(np.eye(3)[LABELS], OUTPUTS)), rel=1e-6)


def test_without_smoothing_it_is_the_sparse_one() -> None:
    expected = float(keras.losses.SparseCategoricalCrossentropy()(LABELS, OUTPUTS))
    assert float(SmoothedCrossentropy(0.0)(LABELS, OUTPUTS)) == pytest.approx(expected, rel=1e-6)


def test_its_minimum_is_the_entropy_of_the_labels() -> None:
    smoothed = 0.9 * np.eye(10)[LABELS] + 0.01
    least = float(SmoothedCrossentropy(0.1)(LABELS, smoothed.astype(np.float32)))
    assert least == pytest.approx(0.5003, abs=1e-4)  # the number in the docstring
    assert float(SmoothedCrossentropy(0.1)(LABELS, np.eye(10, dtype=np.float32)[LABELS])) > least


def test_it_weighs_and_reduces_as_keras_does() -> None:
    weights = np.array([1.0, 0.0, 2.0, 0.0, 0.0], np.float32)
    each = SmoothedCrossentropy(0.1, reduction=None)(LABELS, OUTPUTS).numpy()
    assert each.shape == (5,)
    summed = SmoothedCrossentropy(0.1, reduction="sum")(LABELS, OUTPUTS, sample_weight=weights)
    assert float(summed) == pytest.approx(float((each * weights).sum()), rel=1e-6)


def test_a_saved_model_keeps_it(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", SmoothedCrossentropy(0.2))
    model.save(tmp_path / "m.keras")
    loss = keras.saving.load_model(tmp_path / "m.keras").loss
    assert isinstance(loss, SmoothedCrossentropy)
    assert loss.label_smoothing == 0.2


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing: expected 0 <= x < 1"):
        SmoothedCrossentropy(share)
