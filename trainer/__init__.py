"""A Keras training workflow: configure, load data, build, train, save, report.

The functions below are the public interface; the command line calls the same ones. Tools add
theirs (`trainer.tune`, `trainer.export`, ...). All are imported on first use, because importing
TensorFlow takes seconds.
"""

import importlib
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trainer import tools

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.config_file import load_config
    from trainer.workflow import evaluate, fit, predict, resume

# TensorFlow reads this when it first uses a GPU. It would otherwise allocate the whole memory of
# every GPU at once, and no second process could use one. Set here, it holds for every command, for
# every function, and for the processes that they start.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

__version__ = "0.1.0"
__all__ = ["Config", "evaluate", "fit", "load_config", "predict", "resume"]

_MODULES = {"Config": "trainer.config", "load_config": "trainer.config_file"}
_MODULES |= dict.fromkeys(("evaluate", "fit", "predict", "resume"), "trainer.workflow")


def __getattr__(name: str) -> Any:
    modules = _MODULES
    # Python also asks for __path__ and for submodules: they must not import the tools.
    if not (name in modules or name.startswith("_") or find_spec(f"trainer.{name}")):
        modules = tools.functions()
    if name not in modules:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *tools.functions()})
