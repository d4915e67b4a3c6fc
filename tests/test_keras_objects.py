from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer import devices, keras_objects
from trainer.config import DataConfig, KerasObject, OptimizerConfig
from trainer.data import Dataset, load
from trainer.errors import InputError
from trainer.training.augmentation import make_augmentation
from trainer.training.optimizer import make_optimizer, try_optimizer

KNOWN = [
    ("layer", "Dense", keras.layers.Dense),
    ("loss", "SparseCategoricalCrossentropy", keras.losses.SparseCategoricalCrossentropy),
    ("metric", "AUC", keras.metrics.AUC),
    ("optimizer", "AdamW", keras.optimizers.AdamW),
    ("schedule", "CosineDecay", keras.optimizers.schedules.CosineDecay),
    ("callback", "EarlyStopping", keras.callbacks.EarlyStopping),
]


@keras.saving.register_keras_serializable(package="tests", name="Doubling")
class Doubling(keras.layers.Layer):
    """A layer of the user."""

    def call(self, inputs: Any) -> Any:
        return 2 * inputs

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class OnlyCall(keras.layers.Layer):
    """The minimum that Keras requires of a layer."""

    def call(self, inputs: Any) -> Any:
        return inputs


class Half(keras.layers.Layer):
    """Drops images."""

    def call(self, x: Any) -> Any:
        return x[: (tf.shape(x)[0] + 1) // 2]


class Logarithm(OnlyCall):
    """Not defined for dark pixels."""

    def call(self, inputs: Any) -> Any:
        return tf.math.log(inputs - 50) * 100


class Stretch(OnlyCall):
    """Stretches the range of the whole batch to 0 to 255: the labels still fit."""

    def call(self, inputs: Any) -> Any:
        least, most = tf.reduce_min(inputs), tf.reduce_max(inputs)
        return (inputs - least) * 255 / (most - least)


class Threshold(OnlyCall):
    """Makes each pixel black or white, on purpose."""

    def call(self, inputs: Any) -> Any:
        return tf.where(inputs > 127, 255.0, 0.0)


def named(name: str, **options: Any) -> KerasObject:
    return KerasObject(name=name, options=options)


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Returns the message of an InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("kind", "name", "expected"), KNOWN)
def test_keras_names_are_found_in_any_case(kind: str, name: str, expected: type) -> None:
    for spelt in (name, name.lower(), name.upper()):
        assert keras_objects.find(kind, spelt) is expected


def test_own_classes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keras_objects.find("layer", "tests>Doubling") is Doubling
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "parts.py").write_text(
        "import keras\nclass Halving(keras.layers.Layer): pass\nclass Plain: pass\n"
    )
    (tmp_path / "own_package" / "broken.py").write_text("from os import nothing")
    monkeypatch.syspath_prepend(tmp_path)
    halving = keras_objects.find("layer", "own_package.parts:Halving")
    assert issubclass(halving, keras.layers.Layer)
    assert (halving.__module__, halving.__name__) == ("own_package.parts", "Halving")
    for name, said in [
        ("own_package.parts:Doubling", "own_package.parts has no 'Doubling'"),
        ("own_package.part:Halving", "No module named 'own_package.part'"),
        ("no_such_package:Halving", "No module named 'no_such_package'"),
        ("own_package.broken:Halving", "cannot import name 'nothing'"),
        ("own_package.parts:Plain", "expected a subclass of keras Layer"),
        ("own_package.parts:keras", "expected a subclass of keras Layer"),
    ]:
        message = refused(keras_objects.find, "layer", name)
        assert message.startswith(f"layer {name!r}: ")
        assert said in message


@pytest.mark.parametrize("name", [":Dense", ".layers:Dense"])
def test_a_name_without_a_module_is_refused(name: str) -> None:
    assert name in refused(keras_objects.find, "layer", name)


@pytest.mark.parametrize(("kind", "name", "expected"), KNOWN)
def test_an_unknown_name_shows_the_nearest(kind: str, name: str, expected: type) -> None:
    for wrong in (name + "s", name[1:].lower()):
        message = refused(keras_objects.find, kind, wrong)
        assert f"unknown {kind} {wrong!r}: did you mean '{expected.__name__}'? " in message
        assert " in all)" in message or kind == "schedule"  # long lists are cut


@pytest.mark.parametrize(
    ("kind", "name", "base"),
    [
        ("optimizer", "keras.layers:Dense", "Optimizer"),
        ("layer", "keras.layers:serialize", "Layer"),
        ("schedule", "keras.optimizers:Adam", "LearningRateSchedule"),
    ],
)
def test_a_class_of_another_kind_is_refused(kind: str, name: str, base: str) -> None:
    message = refused(keras_objects.find, kind, name)
    assert message.startswith(f"{kind} {name!r}: expected a subclass of keras {base}, received ")
    # InputSpec is a class of keras.layers, but no layer; the last is a registered layer.
    for kind, name in (("layer", "Adam"), ("layer", "InputSpec"), ("metric", "tests>Doubling")):
        assert f"unknown {kind} {name!r}: " in refused(keras_objects.find, kind, name)


def smooth(labels: Any, outputs: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, outputs) + 1


def test_a_loss_may_be_a_function() -> None:
    assert keras_objects.make("loss", KerasObject(name=f"{__name__}:smooth")) is smooth
    message = refused(keras_objects.make, "loss", named(f"{__name__}:smooth", a=1))
    assert "refuses the options {'a': 1}" in message


def test_make_takes_options_before_defaults() -> None:
    layer = keras_objects.make("layer", named("dense", units=3), units=5, use_bias=False)
    assert isinstance(layer, keras.layers.Dense)
    assert (layer.units, layer.use_bias) == (3, False)
    callback = keras_objects.make("callback", named("EarlyStopping", patience=4))
    assert callback.patience == 4


@pytest.mark.parametrize(
    ("kind", "name", "options", "reason"),
    [
        ("layer", "Dense", {"units": -1}, "positive integer"),
        ("layer", "Dense", {}, "'units'"),
        ("layer", "dense", {"units": 1, "unit": 1}, "unit"),
        ("layer", "Conv2D", {"filters": 3, "kernel_size": "x"}, "kernel_size"),
        ("loss", "SparseCategoricalCrossentropy", {"reduction": "x"}, "reduction"),
        ("metric", "MeanIoU", {"num_classes": "x"}, "integer"),
        ("optimizer", "SGD", {"momentum": 2}, "momentum"),
        ("schedule", "CosineDecay", {"decay_steps": 0}, "initial_learning_rate"),
        ("callback", "ReduceLROnPlateau", {"factor": 2}, "factor >= 1.0"),
    ],
)
def test_refused_options_are_one_line(
    kind: str, name: str, options: dict[str, Any], reason: str
) -> None:
    message = refused(keras_objects.make, kind, named(name, **options))
    assert message.startswith(f"{kind} {name!r} refuses the options {options}: ")
    assert reason in message


def rates(config: OptimizerConfig, steps: Sequence[int], total_steps: int = 100) -> list[float]:
    """Returns the learning rate that an optimizer uses at some steps."""
    optimizer = make_optimizer(config, total_steps)
    found = []
    for step in steps:
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    return found


def scheduled(name: str, *, warmup_fraction: float = 0.0, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=0.4, schedule=named(name, **options), warmup_fraction=warmup_fraction
    )


def test_an_optimizer_with_a_constant_rate() -> None:
    config = OptimizerConfig(name="sgd", learning_rate=0.25, options={"momentum": 0.5})
    optimizer = make_optimizer(config, 100)
    assert isinstance(optimizer, keras.optimizers.SGD)
    assert optimizer.momentum == 0.5
    assert rates(config, [0, 50, 100, 1000]) == [0.25] * 4
    weight = keras.Variable([1.0])
    optimizer.apply([tf.constant([2.0])], [weight])
    assert weight.numpy() == pytest.approx([0.5])


def test_cosine_decay_goes_over_the_run() -> None:
    assert rates(scheduled("CosineDecay"), [0, 25, 50, 100, 150]) == pytest.approx(
        [0.4, 0.2 * (1 + np.sqrt(0.5)), 0.2, 0.0, 0.0], abs=1e-6
    )
    assert rates(scheduled("CosineDecay", alpha=0.5), [100]) == pytest.approx([0.2])
    assert rates(scheduled("cosinedecay", decay_steps=10), [5, 10]) == pytest.approx([0.2, 0])
    own = scheduled("CosineDecay", initial_learning_rate=0.1)
    assert rates(own, [0]) == pytest.approx([0.1])


def test_warmup_climbs_to_the_rate_and_cosine_takes_the_rest() -> None:
    config = scheduled("CosineDecay", warmup_fraction=0.2)
    assert rates(config, [0, 10, 20, 60, 100]) == pytest.approx(
        [0.04, 0.22, 0.4, 0.2, 0.0], abs=1e-6
    )
    # With too few steps there is no warm-up. With warm-up only, the rate stays finite.
    assert rates(config, [0, 2], total_steps=2) == pytest.approx([0.4, 0.0])
    config = scheduled("CosineDecay", warmup_fraction=0.9)
    assert rates(config, [0, 1, 2], total_steps=1) == pytest.approx([0.04, 0.4, 0.0])


def test_other_schedules_take_what_they_know() -> None:
    halving = scheduled("ExponentialDecay", decay_rate=0.5)
    assert rates(halving, [0, 100, 200]) == pytest.approx([0.4, 0.2, 0.1])
    faster = scheduled("ExponentialDecay", decay_rate=0.5, decay_steps=10, staircase=True)
    assert rates(faster, [0, 9, 10, 19, 20]) == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.1])
    # Takes neither decay_steps nor initial_learning_rate.
    stairs = scheduled("PiecewiseConstantDecay", boundaries=[3, 6], values=[0.3, 0.2, 0.1])
    assert rates(stairs, [0, 3, 4, 6, 7]) == pytest.approx([0.3, 0.3, 0.2, 0.2, 0.1])


def test_optimizers_and_schedules_are_refused_in_one_line() -> None:
    def make(**sections: Any) -> None:
        make_optimizer(OptimizerConfig(**sections), 10)

    assert "unknown optimizer 'Adamm': did you mean 'Adam'?" in refused(make, name="Adamm")
    message = refused(make, schedule=named("CosineDecy"))
    assert "unknown schedule 'CosineDecy': did you mean 'CosineDecay'?" in message
    message = refused(make, options={"beta": 1})
    assert message.startswith("optimizer 'Adam' refuses the options {'learning_rate': 0.001, 'beta")
    message = refused(make, schedule=named("ExponentialDecay"))
    assert message.startswith("schedule 'ExponentialDecay' refuses the options {")
    assert "'decay_rate'" in message
    message = refused(make, schedule=named("PiecewiseConstantDecay", boundaries=[3], values=[1]))
    assert "boundaries" in message


@pytest.mark.parametrize(
    "sections",
    [
        {"options": {"beta_1": "x"}},
        {"options": {"clipnorm": "x"}},
        {"name": "Optimizer"},
        {"schedule": named("CosineDecay", alpha="x")},
        {"schedule": named("LearningRateSchedule")},
    ],
)
def test_what_keras_finds_out_late_is_refused_before_training(sections: dict[str, Any]) -> None:
    message = refused(try_optimizer, OptimizerConfig(**sections))
    name = sections.get("name", "Adam")
    assert message.startswith((f"optimizer {name!r} ", "schedule "))
    for ours in ({}, {"name": "SGD"}, {"schedule": named("CosineDecay")}):
        try_optimizer(OptimizerConfig(**ours))


def augmented(tiny: Dataset, *layers: KerasObject) -> np.ndarray:
    augment = make_augmentation(layers, tiny)
    result = augment(tf.constant(tiny.train.read()[0]))
    assert result.dtype == tf.uint8
    return result.numpy()


def test_augmentation_rounds_and_keeps_to_a_byte(tiny: Dataset) -> None:
    images = tiny.train.read()[0].astype(np.float64)
    for scale in (1.0, 0.5, 1.25, 3.0):
        expected = np.clip(np.rint(images * scale), 0, 255)
        np.testing.assert_array_equal(augmented(tiny, named("Rescaling", scale=scale)), expected)
    np.testing.assert_array_equal(
        augmented(tiny, named("tests>Doubling")), np.minimum(2 * images, 255)
    )


def test_layers_are_applied_in_order(tiny: Dataset) -> None:
    images = tiny.train.read()[0].astype(np.float64)
    half, shift = named("Rescaling", scale=0.5), named("Rescaling", scale=1.0, offset=20.0)
    first = augmented(tiny, half, shift)
    np.testing.assert_array_equal(first, np.rint(images / 2 + 20))
    assert (augmented(tiny, shift, half) != first).any()


def test_layers_see_float32_under_any_precision(tiny: Dataset) -> None:
    back_and_forth = [named("Rescaling", scale=s) for s in (1 / 255, 255.0)]
    with devices.dtype_policy("mixed_bfloat16"):  # 8 bits: 1/255 and 2/255 would not be exact
        result = augmented(tiny, *back_and_forth)
    np.testing.assert_array_equal(result, tiny.train.read()[0])


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "tf.function"])
def test_random_layers_repeat_for_a_seed_only(tiny: Dataset, in_graph: bool) -> None:
    layers = [named("RandomTranslation", height_factor=0.3, width_factor=0.3)]
    images = tf.constant(tiny.train.read()[0])

    def batches(seed: int) -> list[np.ndarray]:
        keras.utils.set_random_seed(seed)
        augment = make_augmentation(layers, tiny)
        augment = tf.function(augment) if in_graph else augment
        results = [augment(images) for _ in range(2)]
        assert {(r.dtype, tuple(r.shape)) for r in results} == {(tf.uint8, tuple(images.shape))}
        return [r.numpy() for r in results]

    first, second = batches(1)
    assert (first != images.numpy()).any()
    assert (first != second).any()
    again = batches(1)
    np.testing.assert_array_equal(again, [first, second])
    assert (batches(2)[0] != first).any()


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (named("CenterCrop", height=4, width=4), "of shape [8, 6, 5, 1], received [8, 4, 4, 1]"),
        (named("Flatten"), "of shape [8, 6, 5, 1], received [8, 30]"),
        (named("Permute", dims=[2, 1, 3]), "of shape [8, 6, 5, 1], received [8, 5, 6, 1]"),
        (named("Conv2D", filters=1, kernel_size=7), "data.augmentation: "),
        (named("RandomFlop"), "unknown layer 'RandomFlop': did you mean 'RandomFlip'?"),
        (named("RandomRotation"), "layer 'RandomRotation' refuses the options "),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_layers_that_do_not_fit_are_refused(tiny: Dataset, layer: KerasObject, said: str) -> None:
    fits = named("RandomFlip", mode="horizontal")
    assert said in refused(make_augmentation, [fits, layer], tiny)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (named("MixUp"), "MixUp mixes images, but each image keeps its own label"),
        (named("CutMix"), "CutMix mixes images, but each image keeps its own label"),
        (named(f"{__name__}:Half"), "expected images of shape [8, 6, 5, 1], received [4, 6, 5, 1]"),
        (named("Dense", units=1), "Dense has weights, but augmentation is not"),
        (named("BatchNormalization"), "BatchNormalization has weights"),
        (named("Normalization"), "Normalization has weights, but augmentation is not trained or"),
        (named("Normalization", mean=127.0, variance=64.0**2), "nearly constant"),
        (named("Rescaling", scale=1 / 255), "received pixels from 0"),
        (named("Rescaling", scale=1 / 127.5, offset=-1), "nearly constant"),
        (named("RandomBrightness", factor=0.1, value_range=[0, 1]), "nearly constant"),
        (named(f"{__name__}:Logarithm"), "not finite"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_layers_that_destroy_images_or_need_labels_are_refused(
    tiny: Dataset, layer: KerasObject, said: str
) -> None:
    message = refused(make_augmentation, [named("RandomFlip"), layer], tiny)
    assert message.startswith("data.augmentation")
    assert said in message


@pytest.fixture(scope="module")
def coloured() -> Dataset:
    options = {"examples": 60, "height": 16, "width": 16, "channels": 3, "classes": 3}
    return load(DataConfig(name="synthetic", options=options))


@pytest.mark.parametrize(
    "layer",
    [
        named("AugMix"),
        named("AutoContrast"),
        named("Dropout", rate=0.5),
        named("GaussianNoise", stddev=1.0),
        named("RandAugment"),
        named("RandomBrightness", factor=0.5),
        named("RandomColorDegeneration", factor=0.5),
        named("RandomColorJitter", brightness_factor=0.3, contrast_factor=0.3),
        named("RandomContrast", factor=0.5),
        named("RandomElasticTransform"),
        named("RandomErasing"),
        named("RandomGaussianBlur", sigma=1.0),
        named("RandomGrayscale"),
        named("RandomHue", factor=0.5),
        named("RandomInvert", factor=1.0),
        named("RandomPerspective"),
        named("RandomPosterization", factor=3),
        named("RandomRotation", factor=0.1),
        named("RandomSaturation", factor=0.5),
        named("RandomSharpness", factor=0.5),
        named("RandomShear", x_factor=0.3),
        named("RandomTranslation", height_factor=0.3, width_factor=0.3),
        named("RandomZoom", height_factor=0.3),
        named("Solarization", addition_factor=0.3),
        named(f"{__name__}:Stretch"),
        named(f"{__name__}:Threshold"),
    ],
    ids=lambda layer: layer.name,
)
def test_layers_that_alter_one_image_are_taken(coloured: Dataset, layer: KerasObject) -> None:
    keras.utils.set_random_seed(0)
    assert make_augmentation([layer], coloured) is not None


def test_trying_the_layers_leaves_their_random_state(tiny: Dataset) -> None:
    images = tiny.train.read(slice(5))[0]
    results = []
    for tried in (True, False):
        keras.utils.set_random_seed(3)
        if tried:
            results.append(augmented_by(make_augmentation([named("RandomFlip")], tiny), images))
        else:
            layer = keras.layers.RandomFlip(dtype="float32")
            layer(tf.zeros((1, *tiny.spec.image_shape)), training=True)
            results.append(layer(tf.cast(images, tf.float32), training=True).numpy())
    np.testing.assert_array_equal(*results)


def augmented_by(augment: Any, images: np.ndarray) -> np.ndarray:
    return augment(tf.constant(images)).numpy()


def test_a_layer_need_not_compute_its_shape(tiny: Dataset) -> None:
    images = tiny.train.read()[0]
    np.testing.assert_array_equal(augmented(tiny, named(f"{__name__}:OnlyCall")), images)


def test_a_layer_for_colour_is_refused_for_grey(tiny: Dataset) -> None:
    hue = named("RandomHue", factor=0.5)
    assert "channel" in refused(make_augmentation, [hue], tiny)
