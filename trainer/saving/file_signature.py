"""`images.fit_image` in TensorFlow operations, for the exported signature `serving_files`.

Known differences: TIFF is not supported, only JPEG files are turned by their EXIF orientation,
transparent pixels of an RGBA network are resized without their opacity, and pixels may differ by
one or two of 255 steps because the libraries round differently.
"""

import tensorflow as tf
from PIL import ImageColor

from trainer.preprocessing import Preprocessing

# Weights of red, green and blue in the brightness (ITU-R BT.601), as in Pillow and JPEG.
_LUMA = (0.299, 0.587, 0.114)

# The first bytes of a file, which are searched for the EXIF orientation.
_EXIF_BYTES = 4096


def decode_file(encoded: tf.Tensor, how: Preprocessing) -> tf.Tensor:
    """Decodes one image file and converts it for the network.

    Args:
        encoded: The content of a PNG, JPEG, BMP, GIF or WebP file, string scalar.
        how: The preprocessing of the data.

    Returns:
        uint8 [height, width, channels].
    """
    image = tf.cast(_decode(encoded), tf.float32)  # [height, width, 4]
    background = tf.constant(ImageColor.getcolor(how.background, "RGBA"), tf.float32)
    if how.color != "rgba":
        opacity = image[..., 3:] / 255
        image = tf.round(image[..., :3] * opacity + background[:3] * (1 - opacity))
        background = background[:3]
    if how.color == "grayscale":
        image = tf.round(tf.tensordot(image, tf.constant(_LUMA), 1))[..., tf.newaxis]
        background = tf.round(tf.tensordot(background, tf.constant(_LUMA), 1))[tf.newaxis]
    image = _resized(image, how, background)
    return tf.ensure_shape(tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8), how.shape)


def _decode(encoded: tf.Tensor) -> tf.Tensor:
    """Returns red, green, blue and opacity, uint8 [height, width, 4]."""
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        # The accurate method is that of Pillow.
        lambda: _upright(tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"), encoded),
        lambda: tf.io.decode_image(encoded, expand_animations=False),
    )
    height, width, channels = tf.unstack(tf.shape(image))
    # 1: gray, 2: gray and opacity, 3: color, 4: color and opacity.
    colors = channels - 1 + channels % 2
    opaque = tf.fill((height, width, 1), tf.constant(255, tf.uint8))
    color = tf.tile(image[..., :colors], (1, 1, 3 // colors))
    return tf.concat([color, tf.concat([image, opaque], axis=2)[..., colors : colors + 1]], axis=2)


def _upright(image: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    """Turns a JPEG image by its EXIF orientation (1 to 8; anything else: not at all)."""
    head = tf.io.decode_raw(tf.strings.substr(encoded, 0, _EXIF_BYTES), tf.uint8)
    # The entry of the orientation: tag, type and count, in both byte orders, then the value.
    little, big = _after(head, b"\x12\x01\x03\0\1\0\0\0"), _after(head, b"\1\x12\0\3\0\0\0\1\0")
    turned = tf.transpose(image, (1, 0, 2))
    ways = [
        *(image, image, image[:, ::-1], image[::-1, ::-1], image[::-1]),
        *(turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1]),
    ]
    orientation = tf.where(_after(head, b"Exif\0\0") < 0, 0, tf.maximum(little, big))
    return tf.switch_case(orientation, [lambda way=way: way for way in ways], default=lambda: image)


def _after(content: tf.Tensor, pattern: bytes) -> tf.Tensor:
    """Returns the byte after the first place of a pattern, int32; -1 if it does not occur."""
    places = tf.size(content) - len(pattern)
    same = [content[i : i + places] == byte for i, byte in enumerate(pattern)]
    found = tf.where(tf.reduce_all(tf.stack(same), axis=0))[:, 0]
    return tf.cond(
        tf.size(found) > 0,
        lambda: tf.cast(content[tf.cast(found[0], tf.int32) + len(pattern)], tf.int32),
        lambda: -1,
    )


def _resized(image: tf.Tensor, how: Preprocessing, background: tf.Tensor) -> tf.Tensor:
    height, width = tf.unstack(tf.shape(image))[:2]
    to_height, to_width = how.size
    if how.resize == "crop":
        part_height = tf.maximum(1, tf.minimum(height, width * to_height // to_width))
        part_width = tf.maximum(1, tf.minimum(width, height * to_width // to_height))
        top, left = (height - part_height) // 2, (width - part_width) // 2
        image = image[top : top + part_height, left : left + part_width]
    if how.resize != "pad":
        return tf.image.resize(image, how.size, antialias=True)
    tall = height * to_width >= width * to_height
    size = tf.where(
        tall,
        tf.stack([to_height, tf.maximum(1, (width * to_height + height // 2) // height)]),
        tf.stack([tf.maximum(1, (height * to_width + width // 2) // width), to_width]),
    )
    image = tf.image.resize(image, size, antialias=True)
    top, left = (to_height - size[0]) // 2, (to_width - size[1]) // 2
    edges = [[top, to_height - size[0] - top], [left, to_width - size[1] - left], [0, 0]]
    # Padded with zeros after the background is subtracted, because tf.pad has one value only.
    return tf.pad(image - background, edges) + background
