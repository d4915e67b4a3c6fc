import io
import itertools
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer import figures, report
from trainer.config import Config
from trainer.data import DataSpec

# What the pictures and tables below show: 4 classes, the last of which never occurs.
LABELS = np.array([0, 0, 0, 1, 1, 2, 2], dtype=np.int32)
GUESSES = np.array([0, 0, 1, 1, 0, 0, 0])


def of_classes(*names: str) -> DataSpec:
    return DataSpec(
        name="any",
        version="1",
        image_shape=(6, 5, 1),
        class_names=names,
        train=1,
        validation=1,
        test=1,
        fingerprint="",
        origin="",
    )


def drawn(figure: Figure) -> bytes:
    """Returns the figure as a PNG; a warning of matplotlib is an error here."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@st.composite
def scored(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draws labels and probabilities, few of which differ: ties matter."""
    count, classes = draw(st.integers(0, 8)), draw(st.integers(1, 4))
    labels = draw(arrays(np.int32, count, elements=st.integers(0, classes - 1)))
    shares = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    return labels, draw(arrays(np.float32, (count, classes), elements=shares))


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(0, 9))
def test_the_most_confident_mistakes_come_first(
    scores: tuple[NDArray[Any], NDArray[Any]], count: int
) -> None:
    labels, probabilities = scores
    expected = []
    for i, row in enumerate(probabilities.tolist()):
        if row.index(max(row)) != labels[i]:
            expected.append((-max(row), i))
    found = report.most_confident_mistakes(labels, probabilities, count)
    assert found.tolist() == [i for _, i in sorted(expected)][:count]


def test_precision_and_recall_are_those_worked_out_by_hand() -> None:
    names = ("cat", "dog", "eel", "fox")
    table = figures.class_table(LABELS, GUESSES, of_classes(*names))
    assert tuple(table) == names
    # Guessed, right and there: 5, 2, 3 cats; 2, 1, 2 dogs; 0, 0, 2 eels; no fox at all.
    expected = [
        (2 / 5, 2 / 3, 2 * 2 / (5 + 3), 3),
        (1 / 2, 1 / 2, 2 * 1 / (2 + 2), 2),
        (0, 0, 0, 2),
        (0, 0, 0, 0),
    ]
    for row, values in zip(table.values(), expected, strict=True):
        found = (row["precision"], row["recall"], row["f1-score"], row["support"])
        assert found == pytest.approx(values)


def test_a_class_may_have_any_name() -> None:
    table = figures.class_table(LABELS, GUESSES, of_classes("a", "accuracy", "b", "c"))
    assert table["accuracy"]["support"] == 2


def cells(figure: Figure) -> dict[tuple[int, int], str]:
    """Returns what is written in each cell of the matrix, by row and column."""
    (axes,) = figure.axes
    return {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text()
        for text in axes.texts
    }


def test_each_cell_holds_its_own_number() -> None:
    figure = figures.confusion_figure(LABELS, GUESSES, of_classes("cat", "dog", "eel", "fox"))
    written = {cell: text for cell, text in cells(figure).items() if text}
    assert written == {(0, 0): "2", (0, 1): "1", (1, 0): "1", (1, 1): "1", (2, 0): "2"}
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("class", "taken for")
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["cat", "dog", "eel", "fox"]
    assert axes.get_title() == "4 mistakes in 7 test images"
    (image,) = axes.images
    coloured = np.zeros((4, 4))
    coloured[0, 1], coloured[1, 0], coloured[2, 0] = 1, 1, 2  # the mistakes, not the diagonal
    np.testing.assert_array_equal(image.get_array(), coloured)
    assert drawn(figure)


def test_no_mistakes_can_be_drawn_too() -> None:
    figure = figures.confusion_figure(LABELS, LABELS, of_classes("0", "1", "2", "3"))
    assert [text for text in cells(figure).values() if text] == ["3", "2", "2"]
    assert figure.axes[0].get_title() == "0 mistakes in 7 test images"
    assert drawn(figure)


def test_many_classes_are_coloured_without_numbers() -> None:
    names = [f"class {i}" for i in range(31)]
    figure = figures.confusion_figure(LABELS, GUESSES, of_classes(*names))
    assert cells(figure) == {}
    assert figure.axes[0].images[0].get_array().shape == (31, 31)
    assert len(cells(figures.confusion_figure(LABELS, GUESSES, of_classes(*names[:30])))) == 900


ANY_NAMES = ("$^$", "猫", "_", "a|b\\|c", "*x* `y` <b> [red](z) &amp; #1 ~~no~~ $a$", "n" * 999)


def test_figures_show_any_class_name() -> None:
    # A warning is an error here: matplotlib warns of characters that its font lacks.
    spec = of_classes(*ANY_NAMES)
    figure = figures.confusion_figure(LABELS, GUESSES, spec)
    assert drawn(figure)
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks[:4] == ["$^$", "#1", "_", "a|b\\|c"]
    assert ticks[4:] == ["*x* `y` <b> [red](z)… #4", f"{'n' * 20}… #5"]
    width = figure.axes[0].get_window_extent().width / figure.get_window_extent().width
    assert width > 0.5  # the names leave room for the matrix
    images, labels = np.zeros((6, 6, 5, 1), np.uint8), np.arange(6)
    assert figures.png_of_samples(images, labels, spec)
    assert figures.png_of_mistakes(images, labels, labels[::-1], np.full(6, 0.5), spec)


def test_cut_names_stay_different() -> None:
    names = figures.drawn_names(of_classes(*[f"{'same ' * 9}{i}" for i in range(200)]), 14)
    assert len(set(names)) == 200
    assert max(map(len, names)) == 14


def test_the_model_card_shows_any_class_name() -> None:
    table = figures.class_table(LABELS, GUESSES, of_classes(*ANY_NAMES))
    card = report.model_card(Path("a"), summary(), table, Config())
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(card)
    cells = [
        "".join(part.content for part in following.children or [])
        for token, following in itertools.pairwise(tokens)
        if token.type == "td_open"
    ]
    assert cells[::5] == list(ANY_NAMES)
    kinds = {part.type for token in tokens if token.level == 5 for part in token.children or []}
    assert kinds <= {"text", "text_special"}


@pytest.mark.parametrize(
    ("count", "columns", "channels"),
    [(1, 1, 1), (1, 1, 3), (3, 3, 4), (7, 5, 1), (7, 5, 3), (36, 6, 1)],
)
def test_each_picture_stands_under_its_title(count: int, columns: int, channels: int) -> None:
    images = np.random.RandomState(0).randint(0, 256, (count, 6, 5, channels), dtype=np.uint8)
    titles = [f"title {i}" for i in range(count)]
    figure = figures.picture_grid(images, titles)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == titles
    for text, shown, pixels in zip(axes.texts, axes.images, images, strict=True):
        left, right, bottom, top = shown.get_extent()
        assert text.get_position() == pytest.approx(((left + right) / 2, top - 0.04))
        assert (right - left) / (bottom - top) == pytest.approx(5 / 6)
        np.testing.assert_array_equal(shown.get_array(), pixels.squeeze())
        if channels == 1:  # 0 is black and 255 white, however narrow the image's own range
            assert (shown.get_clim(), shown.get_cmap().name) == ((0, 255), "gray")
    assert count > 7 or drawn(figure)
    lefts, tops = ({shown.get_extent()[i] for shown in axes.images} for i in (0, 3))
    assert (len(tops), len(lefts)) == (-(-count // columns), columns)
    for extent in [shown.get_extent() for shown in axes.images]:
        assert 0 <= extent[0] < extent[1] <= axes.get_xlim()[1]
        assert 0 <= extent[3] < extent[2] <= axes.get_ylim()[0]


def test_pictures_and_titles_go_together() -> None:
    with pytest.raises(ValueError, match="shorter"):
        figures.picture_grid(np.zeros((2, 6, 5, 1), np.uint8), ["one"])


def summary(**changes: Any) -> dict[str, Any]:
    data = {"name": "fashion_mnist", "version": "3.0.1", "origin": "tensorflow-datasets"}
    sizes = {"train": 54000, "validation": 6000, "test": 10000, "fingerprint": "0123abcd" * 8}
    return {
        "data": data | sizes,
        "model": "cnn",
        "parameters": 1234567,
        "devices": ["CPU:0", "CPU:1"],
        "precision": "mixed_bfloat16",
        "seed": 7,
        "epochs": 3,
        "train_images": 5400,
        "test_images": 1000,
        "test": {"loss": 0.03125, "accuracy": 0.98765},
        "step_ms": 2.5,
        "windows": 11,
        "seconds": {"training": 12.34},
    } | changes


def test_the_model_card_tells_the_run() -> None:
    config = Config().with_changes({"model.options": {"units": [3], "text": 'a "b"'}})
    table = figures.class_table(LABELS, GUESSES, of_classes("cat", "dog", "eel", "fox"))
    card = report.model_card(Path("my runs/20260102T030405Z-a"), summary(), table, config)
    assert card.startswith("# 20260102T030405Z-a\n")
    for said in (
        "accuracy 0.9877",
        "loss 0.0312",
        "**fashion_mnist** 3.0.1 (tensorflow-datasets)",
        f"`{'0123abcd' * 8}`",
        "`cnn` network of 1,234,567 parameters",
        "1,000 images, scored once",
        "Trained on 5,400 images for 3 epochs; 6,000 more",
        "CPU:0, CPU:1; precision: mixed_bfloat16; seed: 7",
        "12.3 s, 2.50 ms a step (median of 11 windows)",
        "\n| cat | 0.4000 | 0.6667 | 0.5000 | 3 |\n",
        "\n| fox | 0.0000 | 0.0000 | 0.0000 | 0 |\n",
    ):
        assert said in card
    before, commands, between, toml, after = card.split("```")
    assert tomllib.loads(toml.removeprefix("toml")) == tomllib.loads(config.to_toml())
    assert before.endswith("Score it again, or name the class of an image:\n\n")
    assert [shlex.split(line) for line in commands.removeprefix("sh\n").splitlines()] == [
        ["trainer", "evaluate", "my runs/20260102T030405Z-a"],
        ["trainer", "predict", "my runs/20260102T030405Z-a", "image.png"],
    ]
    assert (between, after) == ("\n\n", "\n")
    unmeasured = report.model_card(Path("a"), summary(step_ms=None, windows=0), table, Config())
    assert "12.3 s\n" in unmeasured
    assert "ms a step" not in unmeasured

    everything = Config().with_changes({"data.train_on_validation": True})
    card = report.model_card(Path("a"), summary(epochs=1), table, everything)
    assert "Trained on 5,400 images for 1 epoch; the 6,000 validation images among them" in card
