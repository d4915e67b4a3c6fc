"""Image files and arrays as inputs of the network: the only preprocessing of this project.

Data sets, `predict`, the server and its page call `fit_image`. The exported signature
`serving_files` does the same with TensorFlow operations as far as these exist.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.errors import InputError, expect
from trainer.preprocessing import Images as Images
from trainer.preprocessing import Preprocessing as Preprocessing
from trainer.preprocessing import border_brightness

# File name extensions of the formats that are read, in lower case.
EXTENSIONS = {".jpg", ".jpeg", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_MODES = {"grayscale": "L", "rgb": "RGB", "rgba": "RGBA"}
# An image with more pixels is refused before it is decoded.
_MAX_PIXELS = 50_000_000
# Mean brightness of the pixels at the border: below and above, it counts as dark and bright.
_DARK, _BRIGHT = 64, 192


def fit_image(image: Image.Image, how: Preprocessing) -> tuple[Images, str]:
    """Converts an image: upright, 8 bits, opaque, color, crop or pad, size.

    Args:
        image: Any image of Pillow; of an animation, the current frame is used.
        how: The preprocessing of the data.

    Returns:
        uint8 [height, width, channels], and what was converted as text ("" if nothing was).

    Raises:
        ValueError: The pixels are floating-point numbers, whose range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    mode, given = _MODES[how.color], f"{image.height}x{image.width} {image.mode}"
    if image.mode == "F":
        raise ValueError("expected whole numbers as pixels, received floating-point numbers")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip instead of scale
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data and mode != "RGBA":
        given += " with transparency"
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, how.background), image)
    image = _resized(image.convert(mode), how)
    height, width = how.size
    wanted = f"{height}x{width} {mode}"
    pixels = np.asarray(image, np.uint8).reshape(how.shape)
    done = {"crop": ", cropped", "pad": ", padded"}.get(how.resize, "")
    return pixels, "" if given == wanted else f"{given} to {wanted}{done}"


def fit_array(array: NDArray[Any], how: Preprocessing) -> Images:
    """Converts an image in an array as `fit_image` does.

    Args:
        array: uint8 or uint16 [height, width, 1, 3 or 4].
        how: The preprocessing of the data.
    """
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    if array.shape == how.shape:
        return array
    return fit_image(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), how)[0]


def _resized(image: Image.Image, how: Preprocessing) -> Image.Image:
    (width, height), (to_height, to_width) = image.size, how.size
    if how.resize == "crop":
        # The largest centered part with the new aspect ratio, as Keras's crop_to_aspect_ratio.
        part_height = max(1, min(height, width * to_height // to_width))
        part_width = max(1, min(width, height * to_width // to_height))
        left, top = (width - part_width) // 2, (height - part_height) // 2
        image = image.crop((left, top, left + part_width, top + part_height))
    if how.resize != "pad":
        return image.resize((to_width, to_height), Image.Resampling.BILINEAR)
    # Resized before it is padded: a padded copy of a long narrow image could fill the memory.
    part_height, part_width = _padded_part(height, width, how.size)
    part = image.resize((part_width, part_height), Image.Resampling.BILINEAR)
    canvas = Image.new(image.mode, (to_width, to_height), how.background)
    canvas.paste(part, ((to_width - part_width) // 2, (to_height - part_height) // 2))
    return canvas


def _padded_part(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of an image that keeps its aspect ratio and fits into a size."""
    to_height, to_width = size
    if height * to_width >= width * to_height:
        return to_height, max(1, (width * to_height + height // 2) // height)
    return max(1, (height * to_width + width // 2) // width), to_width


def read_image(file: Path | bytes, how: Preprocessing, name: str = "") -> tuple[Images, str]:
    """Reads an image file: JPEG (also MPO), PNG, WebP, BMP, or the first frame of GIF or TIFF.

    Args:
        file: The path of the file, or its content.
        how: The preprocessing of the data.
        name: Name of the content in messages.

    Returns:
        As `fit_image`.

    Raises:
        InputError: It is not an image, damaged, or larger than 50 million pixels.
    """
    name = name or str(file)
    with _opened(file, name) as image:
        fits, size = image.width * image.height <= _MAX_PIXELS, "{}x{}".format(*image.size)
        expect(fits, name, f"at most {_MAX_PIXELS} pixels", size)
        image.load()
        return fit_image(image, how)


def read_header(path: Path) -> tuple[int, int, bool]:
    """Returns height and width of an upright image file, and whether it has color.

    Raises:
        InputError: The file is not an image or damaged.
    """
    with _opened(path, str(path)) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation by 90 degrees
        height, width = (image.width, image.height) if turned else (image.height, image.width)
        return height, width, image.mode not in ("1", "L", "LA", "I", "I;16", "I;16B")


@contextmanager
def _opened(file: Path | bytes, name: str) -> Iterator[Image.Image]:
    """Opens an image file. Errors in the block, as of damaged pixels, become an InputError."""
    content = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # large images, damaged EXIF
            Image.open(content, "r", FORMATS) as image,
        ):
            yield image
    except UnidentifiedImageError:
        count = len(file) if isinstance(file, bytes) else file.stat().st_size
        formats = ", ".join(FORMATS)
        raise InputError(
            f"{name} is not an image: expected {formats} or .npy, received {count} bytes"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: expected at most {_MAX_PIXELS} pixels, received more") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # struct.error: damaged EXIF
        raise InputError(f"{name} cannot be read as an image: {error}") from None


def looks_inverted(images: Images, trained: float | None) -> bool:
    """Returns whether the border of images is bright and that of the training images dark.

    Also true in the opposite case. `trained` is the `border_brightness` of the training images.
    """
    if trained is None:
        return False
    low, high = sorted((border_brightness(images), trained))
    return low < _DARK and high > _BRIGHT
