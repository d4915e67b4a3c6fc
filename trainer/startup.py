"""A quick start: importing TensorFlow and Keras takes half as long, and ending no time.

Keras imports scikit-learn, pandas and matplotlib wherever they are installed, for functions that
few programs call. Here these wait until something asks for them.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

# What of Keras brings them along; a module that a version of Keras has not is never asked for.
LATER = (
    "keras.wrappers",  # scikit-learn
    "keras._tf_keras.keras.wrappers",
    "keras.visualization",  # matplotlib.pyplot
    "keras._tf_keras.keras.visualization",
    "keras.src.visualization",
    "keras.src.trainers.data_adapters.array_slicing",  # pandas
)


class _LaterFinder(MetaPathFinder):
    """Finds the modules of `LATER`, to be loaded when an attribute of theirs is first used."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the usual spec with a loader that waits."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in LATER else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextmanager
def lean_imports() -> Iterator[None]:
    """Imports what is imported within without the modules of `LATER` and without garbage runs.

    A million objects are made that all stay: the collector would look through them again and again,
    and once more when the process ends. They are taken out of its sight for good.
    """
    finder = _LaterFinder()
    sys.meta_path.insert(0, finder)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        sys.meta_path.remove(finder)
