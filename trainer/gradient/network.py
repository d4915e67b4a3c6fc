"""Checks the gradients of a network: GradientTape against central differences, weight by weight.

All of it in float64, because the rounding of float32 is as large as the differences. Where a ReLU
or a max pooling switches within a step there is no derivative to compare: such kinks are found from
the losses alone, so that no gradient, right or wrong, decides what is compared.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer import data as datasets
from trainer import devices
from trainer.config import Config
from trainer.errors import CheckError, InputError
from trainer.experiment import compiled_model
from trainer.files import write_text
from trainer.run import make_directory
from trainer.training.step import compute_loss

TOLERANCE = 1e-5
IMAGES = 8
ENTRIES = 20  # of each weight
_EPSILON = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)
# cbrt(eps) is the best step of a central difference (Press et al., Numerical Recipes, 3rd ed.,
# 2007, formula 5.7.8). A smaller one meets fewer kinks, and rounds by less than the tolerance.
STEP = 0.2 * _EPSILON ** (1 / 3)
# A new network's biases are 0, and dark pixels then put ReLUs exactly on their kink.
NUDGE = 0.01


@dataclass(frozen=True)
class WeightCheck:
    """What was found for one weight.

    Attributes:
        weight: Its path in the network.
        shape: Its shape.
        entries: How many it has.
        compared: How many gradients were compared.
        kinks: How many more were drawn and left out, because the loss has a kink there.
        largest: The largest gradient of those compared, absolute.
        relative_error: The largest difference of tape and quotient, relative to the largest
            gradient that was drawn, or to what rounding alone would make of the tolerance.
        connected: Whether the loss depends on the weight, as the tape sees it.
    """

    weight: str
    shape: tuple[int, ...]
    entries: int
    compared: int
    kinks: int
    largest: float
    relative_error: float
    connected: bool

    @property
    def passed(self) -> bool:
        """Whether some gradients were compared and all agree."""
        return self.compared > 0 and self.relative_error <= TOLERANCE  # nan is not


@dataclass(frozen=True)
class Result:
    """The gradients of a network's loss, checked.

    Attributes:
        model: Its name in the configuration.
        data: Name of the data set.
        images: How many the loss is the mean of.
        loss: At the weights that were checked.
        seed: Of the images' order, the weights and the choice of entries.
        weights: What was found for each, in the order of the layers.
    """

    model: str
    data: str
    images: int
    loss: float
    seed: int
    weights: tuple[WeightCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every weight passed."""
        return all(weight.passed for weight in self.weights)

    @property
    def title(self) -> str:
        """What was checked."""
        return f"gradients of {self.model} on {self.data}"

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said besides the table."""
        return (self.conditions, self.verdict)

    @property
    def conditions(self) -> str:
        """A line that says what was compared."""
        kinks = sum(weight.kinks for weight in self.weights)
        return (
            f"d loss/d weight in float64 on {self.images} images of {self.data}; training=False, "
            f"so dropout is off; weights as initialized from seed {self.seed}, each moved by about "
            f"{NUDGE} off the kinks that biases of 0 make; {kinks} entries left out: a kink (ReLU, "
            "max pooling) lies within the step"
        )

    @property
    def verdict(self) -> str:
        """A line that says whether they agree; names the first weight that does not."""
        compared = sum(weight.compared for weight in self.weights)
        bad = next((weight for weight in self.weights if not weight.passed), None)
        if bad is None:
            worst = max(weight.relative_error for weight in self.weights)
            return (
                f"GradientTape and central differences agree in {compared:,} gradients of "
                f"{len(self.weights)} weights: largest relative error {worst:.1e}, tolerance "
                f"{TOLERANCE:.0e}"
            )
        if bad.compared == 0:
            return f"{bad.weight}: all {bad.kinks} entries that were drawn lie at a kink"
        return (
            f"{bad.weight}: expected GradientTape and central differences to agree within "
            f"{TOLERANCE:.0e}, received a relative error of {bad.relative_error:.1e}"
        )

    def table(self) -> list[dict[str, str]]:
        """Returns a dictionary of title and text for each weight."""
        return [
            {
                "weight": check.weight,
                "compared": f"{check.compared} of {check.entries:,}",
                "kinks": str(check.kinks),
                "largest": f"{check.largest:.3g}" + ("" if check.connected else " (None)"),
                "error": f"{check.relative_error:.1e}",
                "": "ok" if check.passed else "WRONG",
            }
            for check in self.weights
        ]

    def write(self, runs: str) -> Path:
        """Keeps it in a new directory of its own: gradient.json.

        Args:
            runs: Folder that holds the run directories.

        Raises:
            InputError: It cannot be written.
        """
        path = make_directory(runs, "gradient")
        text = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        try:
            write_text(path / "gradient.json", text + "\n")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        return path

    def document(self) -> dict[str, Any]:
        """Returns everything in plain values; null stands for what is not finite."""
        rows = []
        for check in self.weights:
            row = asdict(check) | {"passed": check.passed}
            numbers = {k: v for k, v in row.items() if isinstance(v, float)}
            rows.append(row | {k: v if np.isfinite(v) else None for k, v in numbers.items()})
        return {
            "model": self.model,
            "data": self.data,
            "images": self.images,
            "loss": self.loss,
            "seed": self.seed,
            "tolerance": TOLERANCE,
            "step": STEP,
            "passed": self.passed,
            "weights": rows,
            "notes": [self.conditions],
        }


def check(config: Config) -> Result:
    """Compares the gradients of a configuration's network with central differences.

    Args:
        config: Its data, model, loss and seed are used; precision and device are not: float64 on
            TensorFlow's own choice of device.

    Raises:
        InputError: The configuration does not fit together, the network cannot be float64, or its
            loss is not the same from call to call.
        CheckError: The loss is not finite.
    """
    seed = config.training.seed
    data = datasets.load(config.data)
    images, labels = data.train.read(slice(IMAGES))
    with _float64():
        keras.utils.set_random_seed(seed)
        model = compiled_model(config, data.spec)
        _require_float64(model)
        random = np.random.default_rng(seed)
        for weight in model.trainable_variables:
            weight.assign_add(NUDGE * random.standard_normal(weight.shape))
        loss = _Loss(model, images, labels)
        value = loss.value()
        if not np.isfinite(value):
            raise CheckError(f"the loss is {value}: expected a finite number")
        if loss.value() != value:
            raise InputError(
                "the loss of the same weights differs from call to call: expected a network that "
                "draws nothing at random where training=False"
            )
        checks = [
            _check_weight(loss, weight, gradient, random)
            for weight, gradient in zip(model.trainable_variables, loss.gradients(), strict=True)
        ]
    return Result(config.model.name, data.spec.name, len(labels), value, seed, tuple(checks))


class _Loss:
    """The loss of a few images as a function of the network's weights."""

    def __init__(self, model: keras.Model, images: Any, labels: Any) -> None:
        """Traces loss and gradients.

        Args:
            model: Compiled, float64.
            images: uint8 [n, height, width, channels].
            labels: int [n].
        """

        def compute() -> Any:
            outputs = model(images, training=False)
            return compute_loss(model, images, labels, outputs, None, training=False)

        def differentiate() -> Any:
            with tf.GradientTape() as tape:  # records the weights by themselves: tf.Variables
                loss = compute()
            return tape.gradient(loss, [weight.value for weight in model.trainable_variables])

        self._compute = tf.function(compute).get_concrete_function()
        self._differentiate = tf.function(differentiate).get_concrete_function()

    def value(self) -> float:
        """Returns the loss."""
        return float(self._compute())

    def gradients(self) -> list[NDArray[np.float64] | None]:
        """Returns the gradient of each weight; None where the tape finds no way to it."""
        return [
            None if gradient is None else tf.convert_to_tensor(gradient).numpy()
            for gradient in self._differentiate()
        ]


def _check_weight(
    loss: _Loss, weight: Any, gradient: NDArray[np.float64] | None, random: np.random.Generator
) -> WeightCheck:
    """Compares some entries of one weight, drawn at random."""
    start = np.array(weight)
    taped = np.zeros(start.shape) if gradient is None else gradient
    drawn = random.choice(start.size, min(start.size, ENTRIES), replace=False)
    quotients = np.array([_quotients(loss, weight, start, int(entry)) for entry in drawn])
    here = loss.value()
    # What the rounding of two losses makes of a quotient; sums of many products round more often.
    noise = 100 * _EPSILON * abs(here) / STEP
    largest = max(float(abs(quotients[:, 0]).max()), noise / TOLERANCE, _TINY)
    smooth = (abs(quotients[:, 1:]) < TOLERANCE / 4 * largest).all(axis=1)
    expected, received = quotients[smooth, 0], taped.flat[drawn[smooth]]
    wrong = abs(received - expected)
    return WeightCheck(
        weight=weight.path,
        shape=tuple(start.shape),
        entries=start.size,
        compared=len(expected),
        kinks=int((~smooth).sum()),
        largest=float(abs(expected).max(initial=0.0)),
        relative_error=float(wrong.max(initial=0.0)) / largest,
        connected=gradient is not None,
    )


def _quotients(
    loss: _Loss, weight: Any, start: NDArray[np.float64], entry: int
) -> tuple[float, float, float]:
    """Differentiates the loss by one entry, from the losses alone.

    Returns:
        The central difference quotient; how far it is from that of twice the step, which is little
        unless a kink lies between; and the jump from the slope on the left to that on the right,
        extrapolated to a step of zero, which is little unless a kink lies at the very point.
    """

    def at(offset: float) -> float:
        moved = start.copy()
        moved.flat[entry] += offset
        weight.assign(moved)
        return loss.value()

    left_far, left, here, right, right_far = (at(n * STEP) for n in (-2, -1, 0, 1, 2))
    weight.assign(start)
    near, far = (right - left) / (2 * STEP), (right_far - left_far) / (4 * STEP)
    bend = (right - 2 * here + left) / STEP
    bend_far = (right_far - 2 * here + left_far) / (2 * STEP)
    return near, near - far, 2 * bend - bend_far


@contextmanager
def _float64() -> Iterator[None]:
    """Makes float64 what layers, losses and metrics compute in, inside the block."""
    former = keras.config.floatx()
    with devices.dtype_policy("float64"):  # first: a policy that was never set follows floatx
        keras.config.set_floatx("float64")
        try:
            yield
        finally:
            keras.config.set_floatx(former)


def _require_float64(model: keras.Model) -> None:
    """Lets every layer compute in float64, also one that chose its own type.

    The softmax of this package's networks is float32 under every policy. A layer without weights
    can be changed; the weights of another cannot.

    Raises:
        InputError: A layer has weights of another type.
    """
    for layer in model._flatten_layers(include_self=False):
        floats = [weight for weight in layer.weights if "float" in weight.dtype]
        other = [weight for weight in floats if weight.dtype != "float64"]
        if other:
            raise InputError(
                f"layer {layer.name!r} has weights of {other[0].dtype} whatever the dtype policy: "
                "expected one that follows it, to be checked in float64"
            )
        if not layer.weights and layer.compute_dtype in ("float16", "bfloat16", "float32"):
            layer.dtype_policy = keras.DTypePolicy("float64")
