"""How the contract tests call a module of trainer/data or trainer/models.

A module may have these constants (CONTRIBUTING.md describes them):

- `SAMPLE_OPTIONS`: options of `load` or `build`.
- `SAMPLE_IMAGE_SHAPE`: height, width and channels that a network accepts.
- `CONTRACT_TESTS_SKIPPED`: why the tests skip the module.
"""

import importlib
import inspect
from types import ModuleType
from typing import Any, NoReturn

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
    return _options(_module("data", name), "load")


def load_sample(name: str) -> Dataset:
    """Loads a module of trainer/data; skips a module whose files are not here."""
    try:
        return load(DataConfig(name=name, options=data_options(name)))
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
