"""The averaged weights of optimizers with `use_ema`, and their use in scoring."""

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray


class AveragedWeights(keras.callbacks.Callback):
    """Puts the averaged weights into the model while it is scored and saved.

    They are in the model from the validation of an epoch to the start of the next epoch. So every
    callback that copies weights (EarlyStopping, ModelCheckpoint, the checkpoints of a run) copies
    the weights that were scored. Keras itself scores the trained weights. Its `SwapEMAWeights`
    restores the trained weights too early, before the epoch ends. This must be the first callback.

    Attributes:
        trained: The trained weights while the averaged ones are in the model, else None. Saved in
            checkpoints.
        averaged: The averaged weights that replaced them, else None.
    """

    def __init__(self) -> None:
        """Starts with the trained weights in the model."""
        super().__init__()
        self.trained: list[NDArray[Any]] | None = None
        self.averaged: list[NDArray[Any]] | None = None
        self._optimizer: Any = None
        self._variables: list[Any] = []

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Stores the list of averaged weights before a callback freezes some of them."""
        if self.model.optimizer is not self._optimizer:
            self._optimizer = self.model.optimizer
            self._variables = list(self.model.trainable_variables)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Restores the trained weights, except weights that a callback has changed."""
        pairs = zip(self._variables, self.trained or [], self.averaged or [], strict=False)
        for variable, trained, averaged in pairs:
            if np.array_equal(keras.ops.convert_to_numpy(variable), averaged):
                variable.assign(trained)
        self.trained = self.averaged = None

    def on_test_begin(self, logs: Any = None) -> None:
        """Puts the averaged weights into the model."""
        self.on_train_begin(logs)
        if self.trained is None and averages_weights(self._optimizer):
            self.trained = self._values()
            self._optimizer.finalize_variable_values(self._variables)
            self.averaged = self._values()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Puts the averaged weights into the model if the epoch had no validation."""
        self.on_test_begin()

    def _values(self) -> list[NDArray[Any]]:
        return [np.array(keras.ops.convert_to_numpy(variable)) for variable in self._variables]


def simple_optimizers(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """Returns the parts of a LossScaleOptimizer or MultiOptimizer, or the optimizer itself."""
    if hasattr(optimizer, "inner_optimizer"):
        return simple_optimizers(optimizer.inner_optimizer)
    return list(getattr(optimizer, "optimizers", [optimizer]))


def averages_weights(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether an optimizer averages weights (`use_ema`)."""
    return any(each.use_ema for each in simple_optimizers(optimizer))
