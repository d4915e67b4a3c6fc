"""Images and labels in one .npz file.

Names of the arrays: `images` and `labels`, or `x_train`, `y_train` and, if there are any, `x_test`,
`y_test`, `x_validation`, `y_validation` (as in Keras's mnist.npz); optionally `class_names`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import DataConfig
from trainer.data import Examples, Source
from trainer.errors import InputError, expect

_log = logging.getLogger(__name__)


def load(config: DataConfig, *, path: str) -> Source:
    """Reads the file. Python objects in it are never loaded.

    Args:
        config: Not used here.
        path: Images are uint8, or floating-point numbers in [0, 1] or [0, 255], of shape
            [n, height, width] or [n, height, width, channels]. Labels are int [n].

    Raises:
        InputError: The file is not such an archive.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy parses the headers as Python literals
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"data.options.path: {path} cannot be read as .npz: {reason}") from None
    if "images" in arrays and "labels" in arrays:
        arrays |= {"x_train": arrays["images"], "y_train": arrays["labels"]}
    expected = "images and labels, or x_train and y_train"
    expect({"x_train", "y_train"} <= arrays.keys(), path, expected, sorted(arrays))
    scale = _scale(path, arrays)
    splits: dict[str, Any] = {
        split: _examples(path, split, arrays, scale)
        for split in ("train", "validation", "test")
        if f"x_{split}" in arrays
    }
    highest = max(int(labels.max(initial=0)) for _, labels in splits.values())
    names = arrays.get("class_names", np.arange(highest + 1)).tolist()
    return Source(Path(path).stem, "1", [str(name) for name in names], origin=path, **splits)


def _scale(path: str, arrays: Mapping[str, NDArray[Any]]) -> float:
    """Returns the factor from the values of all images to 0 ... 255, and reports their range."""
    images = [array for name, array in arrays.items() if name.startswith("x_")]
    kinds = {array.dtype for array in images}
    fits = all(kind == np.uint8 or np.issubdtype(kind, np.floating) for kind in kinds)
    expect(fits, path, "images of type uint8 or float", ", ".join(map(str, kinds)))
    if kinds == {np.dtype(np.uint8)}:
        return 1.0
    low = min(float(array.min(initial=0)) for array in images)
    high = max(float(array.max(initial=0)) for array in images)
    fits = 0 <= low <= high <= 255  # false for NaN
    expect(fits, path, "values in [0, 1] or [0, 255]", f"{low:g} to {high:g}")
    scale = 255.0 if high <= 1 else 1.0
    _log.info("%s: float images in [0, %g], scaled by %g to 8 bits", path, 255 / scale, scale)
    return scale


def _examples(path: str, split: str, arrays: Mapping[str, NDArray[Any]], scale: float) -> Examples:
    """Returns the images of a split as uint8 [n, height, width, channels], and its labels."""
    images, where = arrays[f"x_{split}"], f"{path}: {split}"
    labels = arrays.get(f"y_{split}", np.empty(0, int))
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # as CIFAR's
    expect(images.ndim in (3, 4), where, "images [n, height, width(, channels)]", images.shape)
    lengths = f"{len(images)} images and labels of shape {list(labels.shape)}"
    expect(labels.shape == (len(images),), where, "as many labels as images", lengths)
    expect(np.issubdtype(labels.dtype, np.integer), where, "integer labels", labels.dtype)
    images = images[..., np.newaxis] if images.ndim == 3 else images
    if images.dtype != np.uint8:
        images = np.rint(images * scale).astype(np.uint8)
    return images, labels
