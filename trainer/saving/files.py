"""Saves the model of a run as a Keras file that contains its origin."""

import os
import zipfile
from pathlib import Path
from typing import Any, Self

import h5py
from pydantic import BaseModel, ConfigDict, field_validator

from trainer.config import Config, parse_config
from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.experiment import restore, spec_of
from trainer.files import write_atomic
from trainer.run import Run, open_run
from trainer.training.weights import save_weights

SUFFIXES = (".keras", ".weights.h5")
_ATTRIBUTE = "trainer.origin"
_MAX_ORIGIN_BYTES = 60_000  # a zip comment and an HDF5 attribute hold at most 64 KiB


class Origin(BaseModel):
    """The run that a model came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    config: Config
    spec: DataSpec  # the data that it was trained on

    @field_validator("config", mode="before")
    @classmethod
    def _accept_old_keys(cls, config: Any) -> Any:
        # Files of earlier versions have the old names of keys.
        stored = isinstance(config, dict)
        return parse_config(config, origin="configuration", stored=True) if stored else config

    @classmethod
    def of(cls, run: Run) -> Self:
        """Returns the origin of the model of a finished run."""
        return cls(run=run.name, config=run.config(), spec=spec_of(run))


def save(
    reference: str, path: str | Path, *, overwrite: bool = False, runs_directory: str = "runs"
) -> dict[str, Any]:
    """Writes the model of a run into one file.

    Args:
        reference: A run directory, its name, or "latest".
        path: Ends in `.keras` (the whole model with its optimizer) or `.weights.h5`.
        overwrite: Replace an existing file.
        runs_directory: Folder of the run directories.

    Returns:
        Path, bytes, parameters and run.

    Raises:
        InputError: There is no such run, or the path has another suffix, exists, or cannot be
            written.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES) or path.name in SUFFIXES or len(path.name) > 200:
        raise InputError(f"expected a name that ends in {' or '.join(SUFFIXES)}, received {path}")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already: replace it with --overwrite")
    if any((folder / "config.toml").is_file() for folder in path.absolute().parents):
        raise InputError(f"{path} is in a run directory: choose another folder")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    run = open_run(reference, runs_directory=runs_directory)
    model = restore(run, compiled=True)
    origin = Origin.of(run).model_dump_json()
    if len(origin) > _MAX_ORIGIN_BYTES:
        raise InputError(
            f"{run.name} cannot be saved: its configuration and class names take {len(origin)} "
            f"bytes (at most {_MAX_ORIGIN_BYTES}): shorten the class names"
        )

    def write_keras(partial: Path) -> None:
        model.save(partial, overwrite=True)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.comment = origin.encode()

    if path.suffix == ".keras":
        try:
            write_atomic(path, write_keras)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
    else:
        save_weights(path, model, attributes={_ATTRIBUTE: origin})
    size = path.stat().st_size
    return {"path": str(path), "bytes": size, "parameters": model.count_params(), "run": run.name}


def read_origin(path: Path) -> Origin | None:
    """Reads the origin from a `.keras` or `.weights.h5` file. None: the file contains none.

    Raises:
        InputError: The origin is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            text: Any = archive.comment
    else:
        with h5py.File(path, "r") as file:
            text = file.attrs.get(_ATTRIBUTE, "")
    try:
        return Origin.model_validate_json(text) if len(text) else None
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f"{path}: its origin is damaged: {error}") from None
