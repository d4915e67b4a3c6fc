"""`training.class_weight` weights the training loss as Keras's `fit(class_weight=...)`."""

from typing import Any

import keras
import numpy as np
import pytest

from trainer.config import Config
from trainer.errors import InputError
from trainer.experiment import PhaseTimer, build_experiment
from trainer.training.loop import Loop

WEIGHTS = [3.0, 0.0, 0.5]


def trained_by_keras(model: Any, tiny: Any, epochs: int) -> dict[str, list[float]]:
    images, labels = tiny.train.read()
    weights = dict(enumerate(WEIGHTS))
    options: Any = {"batch_size": 16, "shuffle": False, "verbose": 0}
    history = model.fit(images, labels, epochs=epochs, class_weight=weights, **options)
    found: dict[str, list[float]] = history.history
    return found


@pytest.mark.parametrize("devices", ["one_device", "two_devices"])
@pytest.mark.parametrize("metrics", [{}, {"weighted_metrics": ["accuracy"]}])
def test_class_weights_match_keras_over_20_steps(
    devices: str,
    metrics: dict[str, Any],
    request: pytest.FixtureRequest,
    tiny: Any,
    compiled_model: Any,
    batches_of: Any,
) -> None:
    chosen = request.getfixturevalue(devices)
    theirs, ours = compiled_model(**metrics), compiled_model(chosen, **metrics)
    expected = trained_by_keras(theirs, tiny, epochs=5)  # 4 steps each
    loop = Loop(ours, chosen, class_weight=WEIGHTS)
    found = loop.fit(batches_of(tiny.train, chosen, 16), epochs=5)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, err_msg=name)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def config(**changes: Any) -> Config:
    settings = {
        "data.name": "synthetic",
        "data.options": {"examples": 60, "height": 6, "width": 5, "classes": 3},
        "model.name": "mlp",
        "training.batch_size": 16,
        "training.precision": "float32",
    }
    return Config().with_changes(settings | {f"training.{k}": v for k, v in changes.items()})


def test_balanced_weights_follow_the_counts() -> None:
    experiment = build_experiment(config(class_weight="balanced"), PhaseTimer())
    counts = np.array(experiment.data.train.class_counts(3))
    weights = np.array(experiment.loop._class_weight)
    np.testing.assert_allclose(weights * counts, counts.sum() / 3)


def test_classes_are_named() -> None:
    experiment = build_experiment(config(class_weight={"pattern 1": 2.5}), PhaseTimer())
    assert experiment.loop._class_weight == [1.0, 2.5, 1.0]
    with pytest.raises(InputError, match=r"training\.class_weight: did you mean 'pattern 1'"):
        build_experiment(config(class_weight={"patern 1": 2.5}), PhaseTimer())


def test_a_step_without_sample_weights_is_refused(compiled_model: Any) -> None:
    from trainer import devices

    def step(model: keras.Model, images: Any, labels: Any) -> Any: ...

    with pytest.raises(InputError, match="step takes no sample weights"):
        Loop(compiled_model(), devices.single("CPU:0"), step=step, class_weight=WEIGHTS)
