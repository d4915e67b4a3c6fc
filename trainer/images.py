"""Image files for a trained network: read, and converted to the shape it was trained on."""

import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.data import DataSpec, Images
from trainer.data._prepared import NPY_ERRORS
from trainer.errors import InputError

# A file that claims more pixels than this is refused before its pixels are unpacked.
_MOST_PIXELS = 50_000_000
# What Pillow raises for damaged files; struct.error for damaged EXIF.
_DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """One image as the network takes it.

    Attributes:
        source: The file, and the index within it where a .npy file holds several.
        pixels: uint8 [height, width, channels].
        converted: What was changed, in words; "" where nothing was.
    """

    source: str
    pixels: Images
    converted: str


def read_pictures(path: Path, spec: DataSpec, *, invert: bool = False) -> list[Picture]:
    """Reads a PNG, JPEG or .npy file and converts it to the shape of a data set.

    Images are converted to grey or colour and resized; arrays are taken as they are, so their
    shape and type must fit.

    Args:
        path: The file.
        spec: Gives height, width and channels.
        invert: Exchange dark and bright, for dark strokes on white paper where the network learnt
            bright ones on black.

    Returns:
        One picture; several for a .npy file that holds several.

    Raises:
        InputError: The file is missing, is a folder, is no image, or does not fit.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(
            f"expected an image file, received {path}: there is no such file"
        ) from None
    except (OSError, ValueError) as error:  # a name that the file system does not take
        raise InputError(f"expected an image file, received {error}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError(f"expected an image file, received {path}: it is {kind}")
    if path.suffix.lower() == ".npy":
        arrays = _read_array(path, spec)
        pictures = [
            Picture(str(path) if len(arrays) == 1 else f"{path}[{i}]", pixels, "")
            for i, pixels in enumerate(arrays)
        ]
    else:
        pictures = [_read_image(path, spec)]
    if invert:
        pictures = [Picture(p.source, 255 - p.pixels, p.converted) for p in pictures]
    return pictures


def _read_array(path: Path, spec: DataSpec) -> Images:
    array: NDArray[Any]
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except NPY_ERRORS as error:
        raise InputError(f"{path} is not a .npy array: {error}") from None
    height, width, channels = spec.image_shape
    shape = array.shape
    if shape[-2:] == (height, width) and channels == 1:
        array = array[..., np.newaxis]
    if array.ndim == 3:
        array = array[np.newaxis]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != spec.image_shape:
        raise InputError(
            f"{path}: expected uint8 (0 to 255) of shape {list(spec.image_shape)}, or several of "
            f"them, received {array.dtype} {list(shape)}"
        )
    if not len(array):
        raise InputError(f"{path} holds no image: its shape is {list(shape)}")
    return np.array(array)  # a copy: the file may change


def _read_image(path: Path, spec: DataSpec) -> Picture:
    height, width, channels = spec.image_shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise InputError(f"{path}: images of {channels} channels can be given as .npy arrays only")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # large images, damaged EXIF
            Image.open(path, formats=("PNG", "JPEG")) as image,
        ):
            if image.width * image.height > _MOST_PIXELS:
                raise InputError(
                    f"{path}: {image.width}x{image.height} pixels; at most {_MOST_PIXELS} are read"
                )
            # A phone's JPEG (MPO) may hold more views or a preview: the first is the photograph.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{path} is an animation: expected one image")
            image.load()
            image = ImageOps.exif_transpose(image)  # a photograph stands as it was taken
            given = f"{image.height}x{image.width} {image.mode}"
            if mode != "RGBA" and "transparency" in image.info:
                given += " with transparency"
            image = _flattened(image, mode)
    except UnidentifiedImageError:
        raise InputError(
            f"{path} is no image: expected PNG, JPEG or .npy, received {path.stat().st_size} bytes"
        ) from None
    except _DAMAGED_IMAGE as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    wanted = f"{height}x{width} {mode}"
    pixels = np.asarray(image, dtype=np.uint8).reshape(spec.image_shape)
    return Picture(str(path), pixels, "" if given == wanted else f"{given} to {wanted}")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info


def _flattened(image: Image.Image, mode: str) -> Image.Image:
    """Converts colours; 16-bit grey is scaled, and what is transparent becomes white paper."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        if "transparency" in image.info:
            grey[grey == image.info["transparency"]] = 65535
        image = Image.fromarray((grey / 257).clip(0, 255).round().astype(np.uint8))
    if mode != "RGBA" and _is_transparent(image):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert(mode)
