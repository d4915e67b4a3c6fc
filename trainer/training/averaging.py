"""The averaged weights of optimizers with `use_ema`, and their use in scoring."""

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainer.training.optimizer import averages_weights


class AveragedWeights(keras.callbacks.Callback):
    """Puts the averaged weights into the model while it is scored and saved.

    They are in the model from the validation of an epoch to the start of the next epoch. So every
    callback that copies weights (EarlyStopping, ModelCheckpoint, the checkpoints of a run) copies
    the weights that were scored. Keras itself scores the trained weights. Its `SwapEMAWeights`
    restores the trained weights too early, before the epoch ends. This must be the first callback.
    """

    def __init__(self) -> None:
        """Starts with the trained weights in the model."""
        super().__init__()
        # While the averaged weights are in the model: both kinds. Saved in checkpoints.
        self.trained: list[NDArray[Any]] | None = None
        self.averaged: list[NDArray[Any]] | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Restores the trained weights, except weights that a callback has changed."""
        if self.trained is None or self.averaged is None:
            return
        pairs = zip(self.model.trainable_variables, self.trained, self.averaged, strict=True)
        for variable, trained, averaged in pairs:
            if np.array_equal(keras.ops.convert_to_numpy(variable), averaged):
                variable.assign(trained)
        self.trained = self.averaged = None

    def on_test_begin(self, logs: Any = None) -> None:  # noqa: ARG002
        """Puts the averaged weights into the model."""
        if self.trained is None and averages_weights(self.model.optimizer):
            self.trained = self._values()
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
            self.averaged = self._values()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Puts the averaged weights into the model if the epoch had no validation."""
        self.on_test_begin()

    def _values(self) -> list[NDArray[Any]]:
        variables = self.model.trainable_variables
        return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
