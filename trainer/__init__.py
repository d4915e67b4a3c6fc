"""A Keras training workflow: configure, load data, build, train, keep, report.

The functions below are the whole of the public interface; the command line calls the same ones.
They are imported on first use, because TensorFlow takes seconds to import.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import Config, load_config
    from trainer.saving.export import export
    from trainer.saving.files import save
    from trainer.saving.loading import load
    from trainer.saving.versions import verify
    from trainer.tuning.search import tune
    from trainer.workflow import evaluate, fit, predict, resume

# TensorFlow reads this when it first uses a GPU. It would otherwise allocate the whole memory of
# every GPU at once, and no second process could use one. Set here, it holds for every command, for
# every function, and for the processes that they start.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

__version__ = "0.1.0"
__all__ = [
    "Config",
    "evaluate",
    "export",
    "fit",
    "load",
    "load_config",
    "predict",
    "resume",
    "save",
    "tune",
    "verify",
]

_HOME = {
    "Config": "trainer.config",
    "load_config": "trainer.config",
    "save": "trainer.saving.files",
    "load": "trainer.saving.loading",
    "export": "trainer.saving.export",
    "verify": "trainer.saving.versions",
    "tune": "trainer.tuning.search",
    "evaluate": "trainer.workflow",
    "fit": "trainer.workflow",
    "predict": "trainer.workflow",
    "resume": "trainer.workflow",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name]), name)
