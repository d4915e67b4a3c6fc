"""`images.fit_image` in TensorFlow operations, for the exported signature `serving_files`.

Known differences: EXIF orientation is ignored, TIFF is not supported, colors of 16-bit files and
resized pixels may differ by one or two of 255 steps because the libraries round differently.
"""

import tensorflow as tf
from PIL import ImageColor

from trainer.images import Preprocessing

# Weights of red, green and blue in the brightness (ITU-R BT.601), as in Pillow and JPEG.
_LUMA = (0.299, 0.587, 0.114)


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
        lambda: tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, expand_animations=False),
    )
    height, width, channels = tf.unstack(tf.shape(image))
    # 1: gray, 2: gray and opacity, 3: color, 4: color and opacity.
    colors = channels - 1 + channels % 2
    opaque = tf.fill((height, width, 1), tf.constant(255, tf.uint8))
    color = tf.tile(image[..., :colors], (1, 1, 3 // colors))
    return tf.concat([color, tf.concat([image, opaque], axis=2)[..., colors : colors + 1]], axis=2)


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
