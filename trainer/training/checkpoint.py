"""What a training leaves behind: the weights, written whole or not at all."""

from pathlib import Path

import h5py
import keras

from trainer.errors import InputError
from trainer.run import Run, write_whole

# How many parameters the file is for: Keras passes over those that a model has no place for.
_PARAMETERS = "trainer.parameters"


def save_weights(run: Run, model: keras.Model) -> None:
    """Writes the model's weights and its optimizer's state into the run.

    Raises:
        InputError: The disk does not take them; what was there before is untouched.
    """

    def write(beside: Path) -> None:
        model.save_weights(beside, overwrite=True)
        with h5py.File(beside, "a") as file:
            file.attrs[_PARAMETERS] = model.count_params()

    try:
        write_whole(run.weights, write)
    except OSError as error:
        variables = [*model.variables, *(model.optimizer.variables if model.optimizer else [])]
        size = sum(v.value.numpy().nbytes for v in variables)
        raise InputError(f"{run.weights}: about {size} bytes cannot be written: {error}") from None


def load_weights(run: Run, model: keras.Model) -> None:
    """Reads the weights of a run into a model of the same architecture.

    Raises:
        InputError: They are missing, damaged, or of another architecture.
    """
    try:
        with h5py.File(run.weights, "r") as file:
            kept = file.attrs[_PARAMETERS]
        if kept != model.count_params():
            raise ValueError(f"it holds {kept} parameters, the model has {model.count_params()}")
        model.load_weights(run.weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{run.weights} cannot be read into this model: {reason}") from None
