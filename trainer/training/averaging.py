"""Averaged weights, which optimizers with `use_ema` keep beside the trained ones."""

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray


class AveragedWeights(keras.callbacks.Callback):
    """Puts the averaged weights into the model while it is scored and its weights are kept.

    They are in the model from the validation of an epoch to the beginning of the next one, so that
    every callback that copies weights (EarlyStopping, ModelCheckpoint, the checkpoints of a run)
    copies what was scored. Keras scores the trained weights, and averages them only when training
    ends; its `SwapEMAWeights` returns to the trained weights before an epoch ends. It must be the
    first callback.

    Attributes:
        trained: The trained weights while the averaged ones are in the model, else None. Part of a
            checkpoint.
    """

    def __init__(self) -> None:
        """Starts with the trained weights in the model."""
        super().__init__()
        self.trained: list[NDArray[Any]] | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Puts the trained weights back."""
        if self.trained is not None:
            for variable, value in zip(self.model.trainable_variables, self.trained, strict=True):
                variable.assign(value)
            self.trained = None

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Puts the averaged weights into the model."""
        if self.trained is None:
            variables = self.model.trainable_variables
            self.trained = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
            self.model.optimizer.finalize_variable_values(variables)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Does so if the epoch had no validation."""
        self.on_test_begin()


def simple_optimizers(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """Returns the optimizers that a LossScaleOptimizer or MultiOptimizer is made of, or itself."""
    if hasattr(optimizer, "inner_optimizer"):
        return simple_optimizers(optimizer.inner_optimizer)
    return list(getattr(optimizer, "optimizers", [optimizer]))


def averages_weights(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether an optimizer averages weights (`use_ema`)."""
    return any(each.use_ema for each in simple_optimizers(optimizer))
