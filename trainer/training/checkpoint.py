"""What a training leaves behind: the weights, written whole or not at all."""

import keras

from trainer.errors import InputError
from trainer.run import Run, write_whole


def save_weights(run: Run, model: keras.Model) -> None:
    """Writes the model's weights and its optimizer's state into the run.

    Raises:
        InputError: The disk does not take them; what was there before is untouched.
    """
    try:
        write_whole(run.weights, lambda beside: model.save_weights(beside, overwrite=True))
    except OSError as error:
        size = sum(v.value.numpy().nbytes for v in model.variables)
        raise InputError(f"{run.weights}: about {size} bytes cannot be written: {error}") from None


def load_weights(run: Run, model: keras.Model) -> None:
    """Reads the weights of a run into a model of the same architecture.

    Raises:
        InputError: They are missing, damaged, or of another architecture.
    """
    try:
        model.load_weights(run.weights)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{run.weights} cannot be read into this model: {reason}") from None
