"""Checks the gradients of a network: GradientTape against central differences, weight by weight.

Everything is computed in float64, because the rounding of float32 is as large as the differences.
If a ReLU or a max pooling switches within a step, there is no derivative to compare. Such kinks are
found from the losses alone, so that a wrong gradient cannot pass as a kink.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import data as datasets
from trainer import devices
from trainer.config import Config
from trainer.errors import CheckError, expect
from trainer.experiment import compiled_model
from trainer.gradient.comparison import GradientResult
from trainer.keras_objects import nested_layers
from trainer.training.callbacks import to_json
from trainer.training.step import compute_loss

TOLERANCE = 1e-5
IMAGES = 8
ENTRIES = 20  # of each weight
_EPSILON = float(np.finfo(np.float64).eps)
_OTHER_FLOATS = ("float16", "bfloat16", "float32")
# cbrt(eps) is the best step of a central difference (Press et al., Numerical Recipes, 3rd ed.,
# 2007, formula 5.7.8). A smaller step meets fewer kinks; its rounding is below the tolerance.
STEP = 0.2 * _EPSILON ** (1 / 3)
# A new network has biases of 0, so that dark pixels put ReLUs exactly on their kink.
PERTURBATION = 0.01


def check(config: Config) -> GradientResult:
    """Compares the gradients of a configuration's network with central differences.

    Args:
        config: Its data, model, loss and seed are used, not its precision and device.

    Raises:
        InputError: The configuration does not fit together, the network cannot compute in float64,
            or its loss differs from call to call.
        CheckError: The loss is not finite.
    """
    seed = config.training.seed
    data = datasets.load(config.data)
    images, labels = data.train.read(slice(IMAGES))
    with devices.dtype_policy("float64"), ExitStack() as stack:  # for the layers
        stack.callback(keras.config.set_floatx, keras.config.floatx())
        keras.config.set_floatx("float64")  # for losses and metrics
        keras.utils.set_random_seed(seed)
        model = compiled_model(config, data.spec)
        _use_float64(model)
        weights = model.trainable_variables
        random = np.random.default_rng(seed)
        for weight in weights:
            weight.assign_add(PERTURBATION * random.standard_normal(weight.shape))

        def compute() -> Any:
            outputs = model(images, training=False)
            return compute_loss(model, images, labels, outputs, None, training=False)

        def differentiate() -> Any:
            with tf.GradientTape() as tape:  # records tf.Variables, such as the weights
                value = compute()
            return tape.gradient(value, [weight.value for weight in weights])

        loss = tf.function(compute).get_concrete_function()
        gradients = tf.function(differentiate).get_concrete_function()()
        value, again = float(loss()), float(loss())
        if not np.isfinite(value):
            raise CheckError(f"loss: expected a finite number, received {value}")
        expected = "the same number in each call for training=False"
        expect(again == value, "loss", expected, f"{value} and {again}")
        pairs = zip(weights, gradients, strict=True)
        rows = [check_weight(loss, weight, gradient, random) for weight, gradient in pairs]
    facts = {"model": config.model.name, "data": data.spec.name, "images": len(labels)}
    return _result(facts | {"loss": value, "seed": seed}, rows)


def check_weight(
    loss: Callable[[], Any], weight: keras.Variable, gradient: Any, random: np.random.Generator
) -> dict[str, Any]:
    """Compares some entries of one weight, drawn at random.

    Args:
        loss: Returns the loss of the present weights.
        weight: The weight, float64.
        gradient: Its gradient by tape; None if the tape finds no path to it.
        random: Draws the entries.

    Returns:
        A row of the JSON document. "relative_error" is relative to the largest gradient that was
        drawn, or to the gradient at which rounding alone reaches the tolerance.
    """
    start = np.array(weight)
    taped = np.zeros(start.shape) if gradient is None else np.array(tf.convert_to_tensor(gradient))

    def loss_at(entry: int, offset: float) -> float:
        moved = start.copy()
        moved.flat[entry] += offset
        weight.assign(moved)
        return float(loss())

    drawn = random.choice(start.size, min(start.size, ENTRIES), replace=False)
    offsets = (-2 * STEP, -STEP, 0, STEP, 2 * STEP)
    losses = np.array([[loss_at(entry, offset) for entry in drawn] for offset in offsets])
    weight.assign(start)
    quotients = (losses[3] - losses[1]) / (2 * STEP)
    # Four neighboring slopes: their changes are equal, except beside a kink.
    changes = np.diff(losses, 2, axis=0) / STEP
    # Rounding of two losses in a quotient. A loss is a sum of many products, hence the factor.
    noise = 100 * _EPSILON * float(abs(losses[2]).max()) / STEP
    scale = max(float(abs(quotients).max()), noise / TOLERANCE, 1e-300)
    smooth = np.ptp(changes, axis=0) < TOLERANCE / 4 * scale
    expected, received = quotients[smooth], taped.flat[drawn[smooth]]
    error = float(abs(received - expected).max(initial=0.0)) / scale
    return {
        "weight": weight.path,
        "shape": list(start.shape),
        "entries": start.size,
        "compared": len(expected),
        "kinks": int((~smooth).sum()),
        "largest": float(abs(expected).max(initial=0.0)),
        "relative_error": error,
        "connected": gradient is not None,
        "passed": len(expected) > 0 and error <= TOLERANCE,  # False for nan
    }


def _result(facts: dict[str, Any], rows: list[dict[str, Any]]) -> GradientResult:
    right = sum(row["passed"] for row in rows)
    worst = max(rows, key=lambda row: (not row["passed"], row["relative_error"]))
    note = (
        f"d loss/d weight in float64 on {facts['images']} images; training=False, so dropout is "
        f"off; weights as initialized from seed {facts['seed']}, plus noise of {PERTURBATION}"
    )
    facts |= {"tolerance": TOLERANCE, "step": STEP, "passed": right == len(rows), "notes": [note]}
    return GradientResult(
        title=f"gradients of {facts['model']} on {facts['data']}",
        passed=facts["passed"],
        verdict=f"GradientTape and central differences agree for {right} of {len(rows)} weights; "
        f"largest relative error {worst['relative_error']:.1e} ({worst['weight']}), tolerance "
        f"{TOLERANCE:.0e}; skipped {sum(row['kinks'] for row in rows)} of "
        f"{sum(row['kinks'] + row['compared'] for row in rows)} gradients at a kink",
        table=[{name: _text(value) for name, value in row.items()} for row in rows],
        document=facts | {"weights": [to_json(row) for row in rows]},
    )


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _use_float64(model: keras.Model) -> None:
    """Changes layers without weights that chose another type, such as a softmax in float32."""
    for layer in nested_layers(model.layers):
        follows = all(weight.dtype not in _OTHER_FLOATS for weight in layer.weights)
        expected = "weights that follow the dtype policy, to be checked in float64"
        expect(follows, f"layer {layer.name!r}", expected, layer.variable_dtype)
        if layer.compute_dtype in _OTHER_FLOATS:
            layer.dtype_policy = keras.DTypePolicy("float64")
