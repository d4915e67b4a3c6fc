"""The exported signature `serving_files` and Pillow make the same pixels from a file."""

import io
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.images import Preprocessing, read_image
from trainer.saving.file_signature import decode_file

SIZES = [(48, 100), (100, 48), (28, 28), (7, 90)]


def smooth(height: int, width: int, channels: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + 3 * k) + y / (11 + k)) for k in range(channels)]
    pixels = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files(height: int, width: int) -> dict[str, bytes]:
    color, gray, clear = (smooth(height, width, channels) for channels in (3, 1, 4))
    palette = color.quantize(16)
    return {
        **{kind: encoded(color, kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP")},
        "gray PNG": encoded(gray, "PNG"),
        "gray JPEG": encoded(gray, "JPEG"),
        "palette": encoded(palette, "PNG"),
        "transparent palette": encoded(palette, "PNG", transparency=3),
        "transparent": encoded(clear, "PNG"),
        "gray and transparent": encoded(clear.convert("LA"), "PNG"),
    }


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("color", ["rgb", "grayscale"])
def test_tensorflow_makes_the_same_pixels_as_pillow(resize: Any, color: Any) -> None:
    how = Preprocessing(size=(32, 24), color=color, resize=resize, background="#204060")
    decode = tf.function(
        lambda content: decode_file(content, how), input_signature=[tf.TensorSpec((), tf.string)]
    )
    for size in SIZES:
        for kind, content in files(*size).items():
            ours = read_image(content, how)[0].astype(int)
            difference = np.abs(decode(tf.constant(content)).numpy() - ours)
            assert difference.max() <= 2, (kind, size)
            assert difference.mean() < 0.3, (kind, size)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are defined
def test_tensorflow_turns_photos_upright(orientation: int, order: str) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112], exif[0x0131] = "maker", orientation, "software"
    content = encoded(smooth(40, 70, 3), "JPEG", exif=exif)
    how = Preprocessing(size=(35, 20), color="rgb")
    ours = read_image(content, how)[0].astype(int)
    assert np.abs(decode_file(tf.constant(content), how).numpy() - ours).max() <= 2
