"""Saves and loads weights in Keras's format. A full disk does not damage an older file."""

import errno
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import tensorflow as tf

from trainer.errors import InputError
from trainer.files import write_atomic

# Number of parameters. It is compared, because Keras ignores weights that the model lacks.
_PARAMETERS = "trainer.parameters"


def save_weights(path: Path, model: keras.Model) -> None:
    """Writes the weights of a model and the state of its optimizer.

    Raises:
        InputError: The disk is full or the folder cannot be written; an older file is unchanged.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    # HDF5 needs about 2048 bytes more for each variable.
    size = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size + 2048 for v in variables)

    def write(partial: Path) -> None:
        if shutil.disk_usage(partial.parent).free < size:
            # HDF5 reports a full disk, but then crashes when the process ends.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        model.save_weights(partial, overwrite=True)
        with h5py.File(partial, "a") as file:
            file.attrs[_PARAMETERS] = model.count_params()

    write_state(path, write, size)


def write_state(path: Path, write: Callable[[Path], Any], size: int) -> None:
    """Calls `write_atomic`. Raises InputError if a file of about `size` bytes cannot be written."""
    try:
        write_atomic(path, write)
    except OSError as error:
        raise InputError(f"{path}: about {size} bytes cannot be written: {error}") from None


def load_weights(path: Path, model: keras.Model) -> None:
    """Reads weights into a model. Raises InputError if the file does not fit or is damaged."""
    try:
        with h5py.File(path, "r") as file:
            saved, only_model = file.attrs[_PARAMETERS], "optimizer" not in file
        if saved != model.count_params():
            raise ValueError(f"expected {model.count_params()} parameters, found {saved}")
        with warnings.catch_warnings():
            if only_model:  # Keras warns that the optimizer has no state in the file
                warnings.simplefilter("ignore")
            model.load_weights(path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read into this model: {reason}") from None
