"""Predicts the classes of image files with any model."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data import DataSpec
from trainer.data._image_files import list_images
from trainer.errors import InputError, expect
from trainer.images import Images, looks_inverted, read_image

_log = logging.getLogger(__name__)

_BATCH = 256  # images that are read and predicted together

OnError = Callable[[InputError], None]


@dataclass(frozen=True)
class Picture:
    """One image as the network takes it.

    Attributes:
        source: The file, and the index if a .npy file contains several images.
        pixels: uint8 [height, width, channels].
        converted: What was converted, as text; "" if nothing was.
    """

    source: str
    pixels: Images
    converted: str


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


def read_pictures(path: Path, spec: DataSpec, *, invert: bool = False) -> list[Picture]:
    """Reads an image file or a .npy file as inputs of a network.

    Arrays must have the right shape and type.

    Args:
        path: The file.
        spec: The data that the network was trained on.
        invert: Exchange dark and bright, for example for dark strokes on white paper if the
            training images have bright strokes on black.

    Returns:
        One picture; several if a .npy file contains several images.

    Raises:
        InputError: The path is not a file, or the file is not an image that fits.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, also for a too long name
        special = "it is a folder" if os.path.isdir(path) else "it is not a regular file"  # noqa: PTH112
        reason = special if os.path.lexists(path) else "there is no such file"
        raise InputError(f"expected an image file, received {path}: {reason}")
    if path.suffix.lower() == ".npy":
        arrays = _read_array(path, spec.image_shape)
        named = [str(path) if len(arrays) == 1 else f"{path}[{i}]" for i in range(len(arrays))]
        pictures = [Picture(*each, "") for each in zip(named, arrays, strict=True)]
    elif spec.preprocessing is None:
        channels = spec.image_shape[2]
        raise InputError(f"{path}: images with {channels} channels must be .npy arrays")
    else:
        pictures = [Picture(str(path), *read_image(path, spec.preprocessing))]
    if invert:
        pictures = [Picture(p.source, 255 - p.pixels, p.converted) for p in pictures]
    return pictures


def _read_array(path: Path, shape: tuple[int, int, int]) -> Images:
    """Returns the images of a .npy file, uint8 [n, height, width, channels]."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python literals
        raise InputError(f"{path} is not a .npy array: {error}") from None
    array = found[..., np.newaxis] if found.shape[-2:] == shape[:2] else found
    array = array[np.newaxis] if array.ndim == 3 else array
    fits = array.dtype == np.uint8 and array.shape[1:] == shape and len(array)
    expected = f"one or more images, uint8 (0 to 255) of shape {list(shape)}"
    expect(fits, str(path), expected, f"{found.dtype} {list(found.shape)}")
    return np.array(array)  # a copy, because the file may change
