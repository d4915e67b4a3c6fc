"""How the contract tests call a module of trainer/data or trainer/models.

A module may have these constants (CONTRIBUTING.md describes them):

- `SAMPLE_OPTIONS`: options of `load` or `build`.
- `SAMPLE_IMAGE_SHAPE`: height, width and channels that a network accepts.
- `CONTRACT_TESTS_SKIPPED`: why the tests skip the module.
"""

import atexit
import functools
import importlib
import inspect
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pictures
import pytest

from trainer.config import DataConfig
from trainer.data import Dataset, load
from trainer.errors import InputError


def _module(package: str, name: str) -> ModuleType:
    module = importlib.import_module(f"trainer.{package}.{name}")
    if reason := getattr(module, "CONTRACT_TESTS_SKIPPED", None):
        pytest.skip(f"{module.__name__}: {reason}")
    return module


def _options(module: ModuleType, function: str) -> dict[str, Any]:
    """Returns the sample options; skips a module that has required options and no samples."""
    if hasattr(module, "SAMPLE_OPTIONS"):
        return dict(module.SAMPLE_OPTIONS)
    parameters = inspect.signature(getattr(module, function)).parameters.values()
    required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if required:
        pytest.skip(f"{module.__name__}: SAMPLE_OPTIONS is missing; required: {required}")
    return {}


def data_options(name: str) -> dict[str, Any]:
    """Returns options with which a module of trainer/data can be loaded."""
    if name in ("folder", "table", "arrays"):
        return {"path": str(_generated(name))}
    return _options(_module("data", name), "load")


@functools.cache
def _generated(name: str) -> Path:
    """Writes images of three shapes, and returns the path that the data set reads."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    if name == "table":
        table = pictures.write_table(folder, 10)
        table.write_text(table.read_text().replace("file,species,part", "path,label,part"))
        return table
    if name == "folder":
        pictures.write_folder(folder / "shapes", 10)
        return folder / "shapes"
    images, labels = pictures.arrays(10)
    np.savez(folder / "shapes.npz", images=images, labels=labels)
    return folder / "shapes.npz"


def load_sample(name: str) -> Dataset:
    """Loads a module of trainer/data; skips a module whose files are not here."""
    try:
        size = (16, 12) if name in ("folder", "table") else None
        return load(DataConfig(name=name, options=data_options(name), image_size=size))
    except InputError as error:
        if not isinstance(error.__context__, OSError):
            raise
        pytest.skip(str(error))


def model_options(name: str) -> dict[str, Any]:
    """Returns options with which a module of trainer/models can be built."""
    return _options(_module("models", name), "build")


def sample_shape(name: str, default: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the image shape that a module of trainer/models asks for, else the default."""
    height, width, channels = getattr(_module("models", name), "SAMPLE_IMAGE_SHAPE", default)
    return height, width, channels


def skip_if_refused(name: str, error: InputError) -> NoReturn:
    """Skips a network that refuses the usual images and gives no SAMPLE_IMAGE_SHAPE."""
    module = _module("models", name)
    if hasattr(module, "SAMPLE_IMAGE_SHAPE"):
        raise error
    pytest.skip(f"{module.__name__}: SAMPLE_IMAGE_SHAPE is missing; {error}")
