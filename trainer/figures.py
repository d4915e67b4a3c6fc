"""Figures and tables of a run, drawn without TensorFlow: by matplotlib and scikit-learn."""

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import NDArray

from trainer.data import DataSpec, Images, Labels

# The most characters of a class name beside a matrix and above a picture.
_TICK_CHARACTERS, _TITLE_CHARACTERS = 24, 14

# Of a picture with its title, in inches.
_CELL_WIDTH, _CELL_HEIGHT = 1.5, 1.8


def confusion_figure(labels: Labels, guesses: NDArray[Any], spec: DataSpec) -> Figure:
    """Draws how often each class was taken for each other one."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, guesses, labels=np.arange(spec.class_count))
    size = min(4 + 0.4 * spec.class_count, 20)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    # Coloured by the mistakes: the diagonal, hundreds of times larger, would hide them.
    mistakes = matrix * (1 - np.eye(spec.class_count, dtype=matrix.dtype))
    axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=max(1, mistakes.max()))
    # More names than this could not be read, and take a minute to draw.
    ticks = np.arange(spec.class_count if spec.class_count <= 100 else 0)
    # Names are text: matplotlib would take what is between two dollars for a formula.
    names = drawn_names(spec, _TICK_CHARACTERS)[: len(ticks)]
    rotation = 0 if max(map(len, names), default=0) <= 3 else 90
    axes.set_xticks(ticks, names, rotation=rotation, parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    right = np.trace(matrix)
    axes.set_title(f"{matrix.sum() - right} mistakes in {matrix.sum()} test images")
    if spec.class_count <= 30:
        for row, column in np.ndindex(*matrix.shape):
            value, strong = matrix[row, column], mistakes[row, column] > mistakes.max() / 2
            axes.text(
                column,
                row,
                str(value) if value else "",
                ha="center",
                va="center",
                color="white" if strong else ("black" if row != column else "gray"),
            )
    return figure


def drawn_names(spec: DataSpec, characters: int) -> list[str]:
    """Returns class names as figures show them.

    A name that is too long is cut, and one with characters that the font lacks is left out. Both
    get their label, for example "tench, Ti… #0" or "#3", so that different classes look different.

    Args:
        spec: Gives the names.
        characters: The most characters of a name.
    """
    font = get_font(findfont(FontProperties()))
    names = []
    for label, name in enumerate(spec.class_names):
        if not all(font.get_char_index(ord(character)) for character in name):
            names.append(f"#{label}")
        elif len(name) > characters:
            number = f"… #{label}"
            names.append(name[: characters - len(number)] + number)
        else:
            names.append(name)
    return names


def picture_grid(images: Images, titles: list[str]) -> Figure:
    """Draws images in rows, each under its title."""
    columns = min(len(images), max(5, round(len(images) ** 0.5)))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(_CELL_WIDTH * columns, _CELL_HEIGHT * rows))
    # One pair of axes for all, in inches: one for each takes five times as long to draw.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    inches = 0.9 * _CELL_WIDTH / max(images.shape[1:3])  # a pixel
    height, width = inches * images.shape[1], inches * images.shape[2]
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(i, columns)
        middle, bottom = _CELL_WIDTH * (column + 0.5), _CELL_HEIGHT * (row + 1) - 0.05
        top = bottom - height
        extent = (middle - width / 2, middle + width / 2, bottom, top)
        if image.shape[-1] in (3, 4):
            axes.imshow(image, extent=extent)
        else:
            axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, extent=extent)
        axes.text(middle, top - 0.04, title, fontsize=8, ha="center", va="bottom", parse_math=False)
    axes.set_xlim(0, _CELL_WIDTH * columns)
    axes.set_ylim(_CELL_HEIGHT * rows, 0)
    return figure


def class_table(labels: Labels, guesses: NDArray[Any], spec: DataSpec) -> dict[str, Any]:
    """Returns precision, recall and F1 of each class, by its name."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels,
        guesses,
        labels=np.arange(spec.class_count),
        zero_division=0.0,
    )
    names = ("precision", "recall", "f1-score", "support")
    return {
        class_name: {name: float(value) for name, value in zip(names, row, strict=True)}
        for class_name, row in zip(spec.class_names, zip(*columns, strict=True), strict=True)
    }


def as_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def png_of_samples(images: Images, labels: Labels, spec: DataSpec) -> bytes:
    """Returns images under the names of their classes as a PNG file."""
    names = drawn_names(spec, _TITLE_CHARACTERS)
    return as_png(picture_grid(images, [names[label] for label in labels]))


def png_of_mistakes(
    images: Images,
    labels: Labels,
    guesses: NDArray[Any],
    confidences: NDArray[Any],
    spec: DataSpec,
) -> bytes:
    """Returns images under their class, the class they were taken for and its probability."""
    names = drawn_names(spec, _TITLE_CHARACTERS)
    titles = [
        f"{names[label]}, taken for\n{names[guess]} ({confidence:.0%})"
        for label, guess, confidence in zip(labels, guesses, confidences, strict=True)
    ]
    return as_png(picture_grid(images, titles))


def png_of_confusion(labels: Labels, guesses: NDArray[Any], spec: DataSpec) -> bytes:
    """Returns `confusion_figure` as a PNG file."""
    return as_png(confusion_figure(labels, guesses, spec))
