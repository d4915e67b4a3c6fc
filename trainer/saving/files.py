"""Saves the model of a run as Keras files that say where they came from."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Self

import h5py
import keras
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.config import Config
from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.experiment import restore, spec_of
from trainer.files import write_atomic
from trainer.run import Run, open_run
from trainer.training.checkpoint import save_weights

ENDINGS = (".keras", ".weights.h5")
_ATTRIBUTE = "trainer.origin"
# What the comment of an archive and an attribute of an HDF5 file can hold.
_MOST_BYTES = 60_000


class Origin(BaseModel):
    """Where a saved model came from.

    Attributes:
        run: Name of the run.
        config: Of the run.
        spec: Of the data it was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    config: Config
    spec: DataSpec

    @classmethod
    def of(cls, run: Run) -> Self:
        """Returns the origin of what a finished run left."""
        return cls(run=run.name, config=run.config(), spec=spec_of(run))


def save(
    reference: str, path: str | Path, *, overwrite: bool = False, runs_directory: str = "runs"
) -> dict[str, Any]:
    """Writes the model of a run into one file.

    Args:
        reference: A run directory, its name, or "latest".
        path: Ends in `.keras` (the whole model with its optimizer) or `.weights.h5`.
        overwrite: Replace a file that is there.
        runs_directory: Folder that holds the run directories.

    Returns:
        What was written: path, bytes, parameters and run.

    Raises:
        InputError: There is no such run, the path has another ending, exists, or cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(ENDINGS) or path.name in ENDINGS or len(path.name) > 200:
        raise InputError(f"expected a name that ends in {' or '.join(ENDINGS)}, received {path}")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already and is left as it is: replace it with --overwrite")
    if any((folder / "config.toml").is_file() for folder in path.absolute().parents):
        raise InputError(f"{path} lies in a run directory, which keeps its own files: elsewhere")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    run = open_run(reference, runs_directory=runs_directory)
    model = restore(run, compiled=True)
    origin = Origin.of(run).model_dump_json()
    if len(origin) > _MOST_BYTES:
        raise InputError(
            f"{run.name} cannot be saved with its origin, which takes {len(origin)} bytes "
            f"(at most {_MOST_BYTES}): shorten the names of its classes"
        )
    if path.suffix == ".keras":
        _save_keras(path, model, origin)
    else:
        save_weights(path, model, attributes={_ATTRIBUTE: origin})
    size = path.stat().st_size
    return {"path": str(path), "bytes": size, "parameters": model.count_params(), "run": run.name}


def origin_of(path: Path) -> Origin | None:
    """Reads where a `.keras` or `.weights.h5` file came from; None where it does not say.

    Raises:
        InputError: What it says is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            text: Any = archive.comment.decode(errors="replace")
    else:
        with h5py.File(path, "r") as file:
            text = file.attrs.get(_ATTRIBUTE, "")
    try:
        if not isinstance(text, str):
            raise TypeError(f"expected text, received {type(text).__name__}")
        return Origin.model_validate(json.loads(text), strict=False) if text else None
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: what it says of its origin is damaged: {reason}") from None


def _save_keras(path: Path, model: keras.Model, origin: str) -> None:
    def write(beside: Path) -> None:
        model.save(beside, overwrite=True)
        with zipfile.ZipFile(beside, "a") as archive:
            archive.comment = origin.encode()

    try:
        write_atomic(path, write)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from None
