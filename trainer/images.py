"""Image files for a trained network: read and converted to the shape of the training images."""

import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.data import DataSpec, Images
from trainer.errors import InputError, expect

# An image with more pixels is refused before it is decoded.
_MAX_PIXELS = 50_000_000
# Errors of Pillow for damaged files; struct.error for damaged EXIF.
_DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


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


def read_pictures(path: Path, spec: DataSpec, *, invert: bool = False) -> list[Picture]:
    """Reads a PNG, JPEG or .npy file and converts it to the shape of a data set.

    Images are converted to gray or color and resized. Arrays must have the right shape and type.

    Args:
        path: The file.
        spec: Contains height, width and channels.
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
        arrays = _read_array(path, spec)
        named = [str(path) if len(arrays) == 1 else f"{path}[{i}]" for i in range(len(arrays))]
        pictures = [Picture(*each, "") for each in zip(named, arrays, strict=True)]
    else:
        pictures = [_read_image(path, spec)]
    if invert:
        pictures = [Picture(p.source, 255 - p.pixels, p.converted) for p in pictures]
    return pictures


def _read_array(path: Path, spec: DataSpec) -> Images:
    """Returns the images of a .npy file, uint8 [n, height, width, channels]."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python literals
        raise InputError(f"{path} is not a .npy array: {error}") from None
    array = found[..., np.newaxis] if found.shape[-2:] == spec.image_shape[:2] else found
    array = array[np.newaxis] if array.ndim == 3 else array
    fits = array.dtype == np.uint8 and array.shape[1:] == spec.image_shape and len(array)
    expected = f"one or more images, uint8 (0 to 255) of shape {list(spec.image_shape)}"
    expect(fits, str(path), expected, f"{found.dtype} {list(found.shape)}")
    return np.array(array)  # a copy, because the file may change


def _read_image(path: Path, spec: DataSpec) -> Picture:
    height, width, channels = spec.image_shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise InputError(f"{path}: images with {channels} channels must be .npy arrays")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # large images, damaged EXIF
            Image.open(path, formats=("PNG", "JPEG")) as image,
        ):
            fits, pixels = image.width * image.height <= _MAX_PIXELS, "{}x{}".format(*image.size)
            expect(fits, str(path), f"at most {_MAX_PIXELS} pixels", pixels)
            # A phone's JPEG (MPO) may contain more views or a preview: the first is the photograph.
            one = image.format == "MPO" or getattr(image, "n_frames", 1) == 1
            expect(one, str(path), "one image", "an animation")
            image.load()
            image = ImageOps.exif_transpose(image)  # turns a photograph upright
            given = f"{image.height}x{image.width} {image.mode}"
            if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scale
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.has_transparency_data and mode != "RGBA":
                given += " with transparency"
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise InputError(
            f"{path} is not an image: expected PNG, JPEG or .npy, received {size} bytes"
        ) from None
    except _DAMAGED_IMAGE as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    wanted = f"{height}x{width} {mode}"
    array = np.asarray(image, dtype=np.uint8).reshape(spec.image_shape)
    return Picture(str(path), array, "" if given == wanted else f"{given} to {wanted}")
