"""Predicts the classes of image files with any model."""

import glob
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data import DataSpec
from trainer.data._image_files import list_images
from trainer.errors import InputError
from trainer.images import Images, Picture, looks_inverted, read_pictures

_log = logging.getLogger(__name__)

_BATCH = 256  # images that are read and predicted together

OnError = Callable[[InputError], None]


def predict_files(
    model: Callable[[Images], NDArray[Any]],
    spec: DataSpec,
    paths: Sequence[str | Path],
    *,
    invert: bool = False,
    on_error: OnError | None = None,
) -> list[dict[str, Any]]:
    """Predicts the class of image files.

    Args:
        model: Maps images, uint8 [n, height, width, channels], to probabilities [n, classes].
        spec: The data that the model was trained on; it defines the preprocessing.
        paths: Image files, .npy files, folders of them, and patterns such as "photos/*.jpg".
        invert: Exchange dark and bright first.
        on_error: Called with the error of each file that cannot be read; the file is skipped.
            None: the first such error is raised.

    Returns:
        For each image: file, class name, label, probability, the probability of every class, and
        the conversions that were necessary.
    """
    results: list[dict[str, Any]] = []
    suggested = invert
    for pictures in _batches(spec, paths, invert, on_error):
        pixels = np.stack([picture.pixels for picture in pictures])
        if not suggested and looks_inverted(pixels, spec.border):
            suggested = True
            _log.warning(
                "The images have a bright border and the training images a dark one, or the other "
                "way round: --invert exchanges dark and bright."
            )
        for picture, row in zip(pictures, model(pixels), strict=True):
            results.append(
                {
                    "image": picture.source,
                    "class": spec.class_names[row.argmax()],
                    "label": int(row.argmax()),
                    "probability": float(row.max()),
                    "probabilities": dict(zip(spec.class_names, map(float, row), strict=True)),
                    "converted": picture.converted,
                }
            )
    return results


def _batches(
    spec: DataSpec, paths: Sequence[str | Path], invert: bool, on_error: OnError | None
) -> Iterator[list[Picture]]:
    pictures: list[Picture] = []
    for path in paths:
        try:
            files = _expand(path)
        except InputError as error:
            files = []
            _report(error, on_error)
        for file in files:
            try:
                pictures += read_pictures(file, spec, invert=invert)
            except InputError as error:
                _report(error, on_error)
            while len(pictures) >= _BATCH:
                yield pictures[:_BATCH]
                del pictures[:_BATCH]
    if pictures:
        yield pictures


def _report(error: InputError, on_error: OnError | None) -> None:
    if on_error is None:
        raise error
    on_error(error)


def _expand(path: str | Path) -> list[Path]:
    """Returns the files of a folder or a pattern, or the file itself."""
    try:
        if Path(path).is_dir():
            found = list_images(Path(path), Counter())
            found = sorted([*found, *Path(path).rglob("*.npy")])
        elif glob.has_magic(str(path)) and not Path(path).exists():
            # Unlike Path.glob, also for absolute patterns.
            found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        else:
            return [Path(path)]
    except OSError:  # a name that is too long; reading it explains that
        return [Path(path)]
    if not found:
        raise InputError(f"{path}: expected image files, found none")
    return found
