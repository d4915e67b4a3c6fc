"""The contract of all networks. A new module is tested without a change here."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from samples import model_options, sample_shape, skip_if_refused

import trainer.models
from trainer import devices
from trainer.config import ModelConfig
from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.models import build, names


def spec_of(height: int, width: int, channels: int, classes: int) -> DataSpec:
    """Describes a data set that does not exist."""
    return DataSpec(
        name="none",
        version="1",
        image_shape=(height, width, channels),
        class_names=tuple(f"class {i}" for i in range(classes)),
        train=1,
        validation=1,
        test=1,
        fingerprint="",
        origin="nowhere",
    )


DIGITS = spec_of(28, 28, 1, 10)
SMALL = spec_of(8, 9, 3, 4)
CONVOLUTION = {"name": "Conv2D", "options": {"filters": 2, "kernel_size": 3}}
SPECS = {"28x28x1-10": DIGITS, "8x9x3-4": SMALL}
# The small images are too small for some defaults. With these options, both sizes work.
FOR_SMALL: dict[str, dict[str, Any]] = {"cnn": {"padding": "same"}, "layers": {}, "mlp": {}}


def some_images(spec: DataSpec, count: int = 5) -> tuple[Any, Any]:
    """Draws images with all values of uint8, and labels."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (count, *spec.image_shape), dtype=np.uint8)
    return images, random.randint(spec.class_count, size=count)


def spec_for(name: str, spec: DataSpec) -> DataSpec:
    """Returns `spec` with the image shape that the network requires."""
    return spec.model_copy(update={"image_shape": sample_shape(name, spec.image_shape)})


def build_for(name: str, spec: DataSpec, policy: str = "float32") -> keras.Model:
    options = FOR_SMALL.get(name, {}) if spec.image_shape == SMALL.image_shape else {}
    config = ModelConfig(name=name, options=model_options(name) | options)
    with devices.dtype_policy(policy):
        keras.utils.set_random_seed(0)
        try:
            return build(config, spec)
        except InputError as refused:
            if name in FOR_SMALL:
                raise
            skip_if_refused(name, refused)


@pytest.fixture(params=list(SPECS))
def spec(request: pytest.FixtureRequest, name: str) -> DataSpec:
    return spec_for(name, SPECS[request.param])


@pytest.fixture(params=names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Adds a network module named `own` that returns the given expression."""
    start = (
        "import keras\n"
        "from keras.layers import Dense, Flatten\n"
        "from trainer.models import class_probabilities, image_input\n"
        "def build(spec, *, units: int = 3):\n"
        "    images, x = image_input(spec)\n"
    )

    def write(end: str) -> None:
        (tmp_path / "own.py").write_text(f"{start}    return keras.Model(images, {end})\n")
        (tmp_path / "_helper.py").write_text("")
        monkeypatch.setattr(trainer.models, "__path__", [*trainer.models.__path__, str(tmp_path)])

    yield write
    sys.modules.pop("trainer.models.own", None)
    vars(trainer.models).pop("own", None)


def test_a_new_module_is_a_network(own_network: Callable[[str], None]) -> None:
    own_network("class_probabilities(Dense(units)(Flatten()(x)), spec)")
    assert {"cnn", "own"} <= set(names())
    assert "_helper" not in names()
    model = build(ModelConfig(name="own", options={"units": 6}), SMALL)
    assert [w.shape for w in model.get_weights()] == [(216, 6), (6,), (6, 4), (4,)]
    assert "unknown option 'unit': did you mean 'units'?" in refusal("own", {"unit": 6})


@pytest.mark.parametrize(
    ("end", "received"),
    [
        ("Dense(spec.class_count + 1)(Flatten()(x))", [None, 5]),
        ("Dense(spec.class_count)(x)", [None, 8, 9, 4]),
    ],
)
def test_a_network_of_another_output_is_refused(
    end: str, received: list[int | None], own_network: Callable[[str], None]
) -> None:
    own_network(end)
    message = refusal("own", {})
    assert f"expected probabilities of shape [None, 4], received {received}" in message


def test_a_network_with_a_dictionary_of_outputs_is_refused(
    own_network: Callable[[str], None],
) -> None:
    own_network('{"a": class_probabilities(Flatten()(x), spec)}')
    message = refusal("own", {})
    assert "expected probabilities of shape [None, 4], received ['dict']" in message


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_raw_images_in_probabilities_out(name: str, spec: DataSpec, policy: str) -> None:
    model = build_for(name, spec, policy)
    assert model.input_shape == (None, *spec.image_shape)
    assert model.inputs[0].dtype == "uint8"
    assert model.output_shape == (None, spec.class_count)
    assert all(variable.dtype == "float32" for variable in model.trainable_variables)
    images, _ = some_images(spec)
    probabilities = model(images)
    assert probabilities.dtype == tf.float32
    assert probabilities.shape == (5, spec.class_count)
    assert (probabilities.numpy() >= 0).all()
    np.testing.assert_allclose(probabilities.numpy().sum(axis=1), 1, rtol=1e-5)
    # Different images have different probabilities.
    assert len(np.unique(probabilities.numpy(), axis=0)) == 5


def test_mixed_precision_computes_in_it(name: str) -> None:
    model = build_for(name, spec_for(name, DIGITS), "mixed_bfloat16")
    assert "bfloat16" in {layer.compute_dtype for layer in model.layers if layer.weights}
    assert keras.config.dtype_policy().name == "float32"  # and nothing else does


def test_scaling_is_inside(name: str, spec: DataSpec) -> None:
    model = build_for(name, spec)
    scales = [layer for layer in model.layers if isinstance(layer, keras.layers.Rescaling)]
    assert len(scales) == 1
    behind = keras.Model(scales[0].output, model.output)
    images, _ = some_images(spec)
    assert (images.min(), images.max()) == (0, 255)
    np.testing.assert_allclose(
        model(images), behind(images.astype(np.float32) / 255), rtol=1e-5, atol=1e-7
    )


def test_gradients_reach_every_weight(name: str, spec: DataSpec) -> None:
    model = build_for(name, spec)
    images, labels = some_images(spec, 32)
    with tf.GradientTape() as tape:
        outputs = model(images, training=False)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, outputs))
    assert model.trainable_variables
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        assert gradient is not None, variable.path
        assert np.isfinite(gradient).all(), variable.path
        assert np.any(gradient), variable.path


def test_equal_seeds_make_equal_networks(name: str) -> None:
    spec = spec_for(name, SMALL)
    one_network, other_network = build_for(name, spec), build_for(name, spec)
    for one, other in zip(one_network.get_weights(), other_network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def refusal(
    name: str, options: dict[str, Any], spec: DataSpec = SMALL, freeze: Sequence[str] = ()
) -> str:
    """Returns the error message for a network, which must be one line."""
    with pytest.raises(InputError) as refused:
        build(ModelConfig(name=name, options=options, freeze=[*freeze]), spec)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_unknown_network_is_refused_with_the_nearest() -> None:
    message = refusal("cmn", {})
    assert message.startswith("unknown model 'cmn': did you mean 'cnn'? available: ")
    assert {"cnn", "layers", "mlp"} <= set(message.partition("available: ")[2].split(", "))


def test_unknown_option_is_refused_with_the_nearest() -> None:
    message = refusal("cnn", {"filter": [8]})
    assert "model.options: unknown option 'filter': did you mean 'filters'?" in message
    assert "kernel_size" in message


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cnn", {"dense": "many"}, "dense: expected a valid integer, received 'many'"),
        ("cnn", {"dense": 0}, "dense: expected greater than or equal to 1, received 0"),
        ("cnn", {"dense": True}, "dense: expected a valid integer, received True"),
        ("cnn", {"dropout": 1.0}, "dropout: expected less than 1, received 1.0"),
        ("cnn", {"filters": [8, "x"]}, "filters.1: expected a valid integer, received 'x'"),
        ("cnn", {"filters": []}, "filters"),
        ("cnn", {"padding": "reflect"}, "padding: expected 'valid' or 'same', received 'reflect'"),
        ("mlp", {"units": [8, 0]}, "units.1: expected greater than or equal to 1, received 0"),
        ("mlp", {"activation": 3}, "activation: expected a valid string, received 3"),
        ("mlp", {"dropout": float("nan")}, "dropout: expected a finite number, received nan"),
        ("layers", {"layers": "Dense"}, "layers: expected a valid array, received 'Dense'"),
        ("layers", {"layers": [{"nam": "Dense"}]}, "layers.0"),
        ("layers", {"layers": []}, "layers"),
    ],
)
def test_wrong_option_is_refused_by_its_name(
    name: str, options: dict[str, Any], expected: str
) -> None:
    message = refusal(name, options)
    assert message.startswith("model.options.")
    assert expected in message


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # The images are 8 x 9: the second convolution would have no output.
        ("cnn", {}, "model 'cnn' cannot be built"),
        ("mlp", {"activation": "rellu"}, "rellu"),
        (
            "layers",
            {"layers": [{"name": "Flatten"}, CONVOLUTION]},
            "is incompatible with the layer: expected min_ndim=4, found ndim=2",
        ),
        (
            "layers",
            {"layers": [{"name": "Desne", "options": {"units": 4}}]},
            "did you mean 'Dense'?",
        ),
        (
            "layers",
            {"layers": [{"name": "Dense", "options": {"unit": 4}}]},
            "layer 'Dense' refuses the options {'unit': 4}",
        ),
        (
            "layers",
            {"layers": [{"name": "Dense", "options": {"units": -4}}]},
            "layer 'Dense' refuses the options {'units': -4}",
        ),
        (
            "layers",
            {"layers": [{"name": "Flatten", "options": {"name": "a b"}}]},
            "expected layer names of letters, digits and _ . - / (no spaces), received 'a b'",
        ),
        ("layers", {"layers": [{"name": "no_such_module:Thing"}]}, "no_such_module"),
        ("layers", {"layers": [{"name": "json:loads"}]}, "expected a subclass of keras Layer"),
        ("layers", {"layers": [{"name": "json:Layer"}]}, "json has no 'Layer'"),
    ],
)
def test_network_that_cannot_be_is_refused_in_one_line(
    name: str, options: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(name, options)


def test_options_shape_the_network() -> None:
    config = ModelConfig(
        name="cnn",
        options={
            "filters": [3, 5],
            "kernel_size": 3,
            "padding": "same",
            "dense": 7,
            "dropout": 0.0,
        },
    )
    shapes = [w.shape for w in build(config, SMALL).get_weights()]
    # 8 x 9, halved twice and rounded up: 2 x 3 with 5 channels.
    assert shapes[::2] == [(3, 3, 3, 3), (3, 3, 3, 5), (2 * 3 * 5, 7), (7, 4)]
    linear = build(ModelConfig(name="mlp", options={"units": []}), SMALL)
    assert [w.shape for w in linear.get_weights()] == [(8 * 9 * 3, 4), (4,)]


def test_layers_of_the_configuration_follow_each_other() -> None:
    convolution = {"filters": 6, "kernel_size": 3, "padding": "same", "use_bias": False}
    described = [
        {"name": "Conv2D", "options": convolution},
        {"name": "BatchNormalization"},
        {"name": "activation", "options": {"activation": "relu"}},  # in any case of its letters
        {"name": "MaxPooling2D", "options": {"pool_size": 2}},
        {"name": "keras.layers:SpatialDropout2D", "options": {"rate": 0.1}},
        {"name": "SeparableConv2D", "options": {"filters": 8, "kernel_size": 3}},
        {"name": "GlobalAveragePooling2D"},
        {"name": "LayerNormalization"},
        {"name": "Dense", "options": {"units": 5, "activation": "gelu", "bias_regularizer": "l2"}},
        {"name": "Dropout", "options": {"rate": 0.5}},
    ]  # fmt: skip
    model = build(ModelConfig(name="layers", options={"layers": described}), SMALL)
    assert [type(layer).__name__ for layer in model.layers[2:-2]] == [
        "Conv2D",
        "BatchNormalization",
        "Activation",
        "MaxPooling2D",
        "SpatialDropout2D",
        "SeparableConv2D",
        "GlobalAveragePooling2D",
        "LayerNormalization",
        "Dense",
        "Dropout",
    ]
    assert model.layers[2].filters == 6
    assert not model.layers[2].use_bias
    images, _ = some_images(SMALL)
    np.testing.assert_allclose(model(images).numpy().sum(axis=1), 1, rtol=1e-5)


def test_layers_flatten_what_is_not_flat() -> None:
    model = build(ModelConfig(name="layers", options={"layers": [CONVOLUTION]}), SMALL)
    assert model.get_layer("logits").kernel.shape == (6 * 7 * 2, 4)
