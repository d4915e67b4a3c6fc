"""What a training leaves behind: the weights, written whole or not at all."""

import h5py
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
        kept = _count_numbers(run)
        if kept != model.count_params():  # Keras passes over what the model has no place for
            raise ValueError(f"it holds {kept} numbers, the model has {model.count_params()}")
        model.load_weights(run.weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{run.weights} cannot be read into this model: {reason}") from None


def _count_numbers(run: Run) -> int:
    """Returns how many numbers the file keeps for the model itself, its optimizer left out."""
    sizes = []

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer/"):
            sizes.append(item.size)

    with h5py.File(run.weights, "r") as file:
        file.visititems(note)
    return sum(sizes)
