"""The pictures of a run, drawn with Pillow: grids of images and the confusion matrix.

matplotlib would add 0.4 s to every training, most of it for its import; only its font is used here.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.data import DataSpec, Images

# Maximum length of a class name beside the matrix and above an image.
TICK_CHARACTERS, TITLE_CHARACTERS = 24, 14

# Sizes in a grid, in pixels: width of a cell, longer side of an image, two lines of title, font.
_CELL_WIDTH, _IMAGE_SIZE, _TITLE_HEIGHT, _FONT_SIZE = 180, 150, 40, 12

# Colors of the confusion matrix: no mistakes, most mistakes.
_WHITE, _RED = np.array([255, 245, 240]), np.array([180, 10, 20])


@cache
def _font_path() -> str:
    from matplotlib.font_manager import FontProperties, findfont

    return str(findfont(FontProperties()))


def confusion_image(matrix: NDArray[Any], names: list[str]) -> NDArray[np.uint8]:
    """Draws a confusion matrix.

    Args:
        matrix: int [classes, classes]: rows are true classes, columns predicted classes.
        names: Class names as `drawn_names` returns them.

    Returns:
        RGB pixels, uint8 [height, width, 3]. Numbers are drawn for up to 30 classes, names for up
        to 100.
    """
    classes, font = len(matrix), ImageFont.truetype(_font_path(), _FONT_SIZE)
    # Pixels of a cell: less for more classes.
    size = 44 if classes <= 30 else 18 if classes <= 100 else 1200 // classes + 1
    # Only mistakes are colored: the diagonal is hundreds of times larger and would hide them.
    mistakes = matrix * (1 - np.eye(classes, dtype=matrix.dtype))
    strength = mistakes / max(1, mistakes.max())
    colors = _WHITE + strength[..., np.newaxis] * (_RED - _WHITE)
    cells = Image.fromarray(colors.astype(np.uint8))
    # Columns show only the label, because names are too long; rows show name and label.
    named = enumerate(names if classes <= 100 else [])
    rows = [name if name == str(label) else f"{name}  {label}" for label, name in named]
    left, top = 20 + max((round(font.getlength(row)) for row in rows), default=0), 70
    width, height = max(320, left + classes * size + 20), top + classes * size + 20
    picture = Image.new("RGB", (width, height), "white")
    picture.paste(cells.resize((classes * size,) * 2, Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(picture)
    centers = size * (np.arange(classes) + 0.5)
    for label, row in enumerate(rows):
        draw.text((left - 6, top + centers[label]), row, "black", font, "rm")
        draw.text((left + centers[label], top - 5), str(label), "black", font, "md")
    for row, column in np.argwhere(matrix) if classes <= 30 else ():
        color = "gray" if row == column else "white" if strength[row, column] > 0.5 else "black"
        place = left + centers[column], top + centers[row]
        draw.text(place, str(matrix[row, column]), color, font, "mm")
    title = f"{mistakes.sum():,} mistakes in {matrix.sum():,} test images"
    axes = "rows: true class, columns: predicted class"
    draw.multiline_text((20, 8), f"{title}\n{axes}", "black", font)
    return np.asarray(picture)


def drawn_names(spec: DataSpec, characters: int) -> list[str]:
    """Returns the class names for a picture, with at most `characters` characters.

    A long name is cut. A name with characters that the font lacks is left out. Both get their
    label, for example "tench, Ti… #0" or "#3", so that different classes look different.
    """
    from matplotlib.font_manager import get_font

    font = get_font(_font_path())

    def drawn(label: int, name: str) -> str:
        if not all(font.get_char_index(ord(character)) for character in name):
            return f"#{label}"
        number = f"… #{label}"
        return name if len(name) <= characters else name[: characters - len(number)] + number

    return [drawn(label, name) for label, name in enumerate(spec.class_names)]


def image_grid(images: Images, titles: list[str]) -> NDArray[np.uint8]:
    """Draws images in rows, each below its title.

    Args:
        images: uint8 [n, height, width, channels], n >= 1. With 2 or more than 4 channels, only
            the first is drawn.
        titles: The n titles.

    Returns:
        RGB pixels, uint8 [height, width, 3].
    """
    height, width, channels = images.shape[1:]
    scale = _IMAGE_SIZE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarged pixels keep their edges; smaller copies are averaged.
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    columns = min(len(images), max(5, round(len(images) ** 0.5)))
    rows, cell_height = math.ceil(len(images) / columns), size[1] + _TITLE_HEIGHT
    grid = Image.new("RGB", (columns * _CELL_WIDTH, rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.truetype(_font_path(), _FONT_SIZE)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = i % columns * _CELL_WIDTH, i // columns * cell_height + _TITLE_HEIGHT - 4
        middle = left + _CELL_WIDTH // 2
        shown = Image.fromarray(image if channels in (3, 4) else image[..., 0])
        shown = shown.resize(size, resampling)
        grid.paste(shown, (middle - size[0] // 2, top), shown if channels == 4 else None)
        place = (middle, top - 3)
        draw.multiline_text(place, title, fill="black", font=font, anchor="md", align="center")
    return np.asarray(grid)
