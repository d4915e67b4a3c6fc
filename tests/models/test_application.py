"""Networks of keras.applications: scaling, batch normalization, weights files, frozen layers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import applications
import keras
import numpy as np
import pytest
from test_models import refusal, some_images, spec_of

from trainer import devices
from trainer.config import ModelConfig
from trainer.keras_objects import count_trainable, nested_layers
from trainer.models import application, build

RGB = spec_of(32, 32, 3, 3)
GRAY = spec_of(32, 32, 1, 3)


def preprocess_input(name: str) -> Callable[..., Any]:
    """Returns the function of the module of an application."""
    module = getattr(keras.applications, name).__module__
    return sys.modules[module].preprocess_input  # type: ignore[no-any-return]


def small(**changes: Any) -> ModelConfig:
    """A MobileNet with random weights."""
    freeze = changes.pop("freeze", [])
    options = {"name": "MobileNet", "weights": "none"} | changes
    return ModelConfig(name="application", options=options, freeze=freeze)


@pytest.fixture(scope="module")
def no_top(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A weights file of MobileNet, and its weights."""
    path = tmp_path_factory.mktemp("weights") / "mobilenet_no_top.h5"
    return path, applications.write_no_top(path, "MobileNet").get_weights()


def test_the_scaling_of_every_application_is_known() -> None:
    images, _ = some_images(RGB)
    kinds = set()
    for name in application.available():
        order, scale, offset = application.scaling(preprocess_input(name))
        kinds.add((*order, *scale))
        found = images[..., order] * np.array(scale) + offset
        expected = preprocess_input(name)(images.astype(np.float64))
        np.testing.assert_allclose(found, expected, atol=1e-9, err_msg=name)
    assert len(kinds) == 4
    assert {"MobileNetV2", "ResNet50", "EfficientNetB0", "VGG16"} <= set(application.available())


@pytest.mark.parametrize("spec", [RGB, GRAY], ids=["rgb", "grayscale"])
@pytest.mark.parametrize("name", ["MobileNetV2", "DenseNet121", "ResNet50", "EfficientNetB0"])
def test_pixels_are_scaled_as_the_network_expects_them(
    name: str, spec: Any, tmp_path: Path
) -> None:
    """Also with bfloat16, and after the layers were saved and loaded in Keras's safe mode."""
    images, _ = some_images(spec)
    expected = preprocess_input(name)(np.repeat(images, 3 // images.shape[-1], 3).astype("float32"))
    with devices.dtype_policy("mixed_bfloat16"):
        inputs = keras.Input(spec.image_shape, dtype="uint8")
        model = keras.Model(inputs, application._preprocess(inputs, preprocess_input(name)))
    model.save(tmp_path / "scaling.keras")
    for each in (model, keras.saving.load_model(tmp_path / "scaling.keras")):
        assert each(images).dtype == "float32"
        np.testing.assert_allclose(each(images), expected, atol=2e-5, rtol=1e-6)


def test_an_application_maps_raw_images_to_probabilities(no_top: tuple[Path, list[Any]]) -> None:
    images, _ = some_images(RGB)
    file, weights = no_top
    with devices.dtype_policy("mixed_bfloat16"):
        model = build(small(weights=str(file)), RGB)
    probabilities = model(images)
    assert probabilities.dtype == "float32"
    np.testing.assert_allclose(probabilities.numpy().sum(axis=1), 1, rtol=1e-5)
    assert len(np.unique(probabilities.numpy(), axis=0)) == len(images)
    network = model.get_layer("mobilenet")
    for one, other in zip(network.weights, weights, strict=True):
        np.testing.assert_array_equal(one, other)
    # A restored run does not need the file.
    restored = build(small(weights="no_such_file.h5"), RGB, initialize=False)
    assert restored.count_params() == model.count_params()


@pytest.mark.parametrize("mode", ["frozen", "trained"])
def test_batch_normalization_stays_in_inference_mode(mode: str) -> None:
    images, _ = some_images(RGB)
    model = build(small(batch_normalization=mode), RGB)
    layers = nested_layers(model.layers)
    norms = [each for each in layers if isinstance(each, keras.layers.BatchNormalization)]
    assert len(norms) == 27
    before = [weight.numpy() for norm in norms for weight in norm.weights]
    model(images, training=True)
    after = [weight.numpy() for norm in norms for weight in norm.weights]
    unchanged = all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert unchanged == (mode == "frozen")
    assert len(model.trainable_variables) == (29 if mode == "frozen" else 29 + 2 * 27)


def test_frozen_layers_are_chosen_by_their_paths() -> None:
    model = build(small(freeze=["mobilenet"]), RGB)
    assert count_trainable(model) == 3 * (1024 + 1)
    model = build(small(freeze=["*/conv_dw_1", "mobilenet/conv_pw_1[0-3]"]), RGB)
    frozen = {path for layer, path in nested_layers(model.layers).items() if not layer.trainable}
    assert {path for path in frozen if not path.endswith("_bn")} == {
        f"mobilenet/conv_{name}" for name in ("dw_1", "pw_10", "pw_11", "pw_12", "pw_13")
    }


def test_wrong_options_are_refused_in_one_line(
    no_top: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    file = tmp_path / "text_no_top.h5"
    file.write_text("no weights")
    message = refusal("application", {"name": "MobilNetV2"})
    assert "model.options.name: unknown application 'MobilNetV2': did you mean 'Mob" in message
    message = refusal("application", {"name": "MobileNet", "weights": "none"})  # 8 x 9
    assert "MobileNet': Input size must be at least 32x32; Received: input_shape=(8," in message
    assert message.endswith("set data.image_size")
    message = refusal("application", {"weights": "mobile.h5"}, RGB)
    expected = 'expected "imagenet", "none" or a weights file, received \'mobile.h5\''
    assert message == f"model.options.weights: {expected}"
    archive = tmp_path / "damaged.keras"
    archive.write_text("no archive")
    for each, reason in [
        (no_top[0], "Layer count mismatch"),
        (file, "file signature not found"),
        (archive, "not a zip file"),
    ]:
        message = refusal("application", {"weights": str(each)}, RGB)
        expected = "expected weights of MobileNetV2 without classification layers (..._no_top.h5)"
        assert message.startswith(f"model.options.weights: {each}: {expected}: ")
        assert reason in message


def test_frozen_layers_that_do_not_exist_are_refused() -> None:
    options: dict[str, Any] = {"units": [4]}
    message = refusal("mlp", options, freeze=["hiden_1"])
    assert message.startswith("model.freeze: no layer matches 'hiden_1': did you mean 'hidden_1'?")
    message = refusal("mlp", options, freeze=["*"])
    assert message == (
        "model.freeze: expected a layer with weights that is not frozen, received ['*']"
    )
