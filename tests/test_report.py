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
from numpy.typing import NDArray
from PIL import ImageDraw
from sklearn.metrics import precision_recall_fscore_support

from trainer import figures, report
from trainer.config import Config
from trainer.data import DataSpec

# A confusion matrix of 4 classes: true classes by predicted classes. The last never occurs.
MATRIX = np.array([[2, 1, 0, 0], [1, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
WHITE = (255, 255, 255)


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


@st.composite
def scored(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draws labels and probabilities with many ties."""
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


def test_precision_and_recall_match_a_calculation_by_hand() -> None:
    names = ("cat", "accuracy", "eel", "fox")
    table = report.class_table(MATRIX, names)
    assert tuple(table) == names
    # Predicted, correct, true: 5, 2, 3 cats; 2, 1, 2 of class 1; 0, 0, 2 eels; no fox.
    expected = [
        (2 / 5, 2 / 3, 2 * 2 / (5 + 3), 3),
        (1 / 2, 1 / 2, 2 * 1 / (2 + 2), 2),
        (0, 0, 0, 2),
        (0, 0, 0, 0),
    ]
    for row, values in zip(table.values(), expected, strict=True):
        found = (row["precision"], row["recall"], row["f1-score"], row["support"])
        assert found == pytest.approx(values)


@settings(max_examples=50, deadline=None)
@given(arrays(np.int32, (20, 2), elements=st.integers(0, 4)))
def test_the_class_table_matches_scikit_learn(pairs: NDArray[Any]) -> None:
    labels, predicted = pairs.T
    matrix = np.zeros((5, 5), int)
    np.add.at(matrix, (labels, predicted), 1)
    table = report.class_table(matrix, "abcde")
    expected = precision_recall_fscore_support(
        labels, predicted, labels=np.arange(5), zero_division=0.0
    )
    found = np.array([list(row.values()) for row in table.values()])
    np.testing.assert_allclose(found, np.transpose(expected))


Texts = list[tuple[tuple[float, float], str, str]]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    """The texts that are drawn: place, text and colour."""
    drawn: Texts = []
    draw = ImageDraw.ImageDraw.text

    def record(self: Any, xy: Any, text: Any, fill: Any = None, *rest: Any, **options: Any) -> Any:
        drawn.append(((float(xy[0]), float(xy[1])), text, fill))
        return draw(self, xy, text, fill, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


def test_the_confusion_matrix_shows_numbers_names_and_mistakes(texts: Texts) -> None:
    picture = figures.confusion_image(MATRIX, ["cat", "dog", "eel", "3"])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    rows = {text: place[1] for place, text, _ in texts[:8:2]}
    columns = {text: place[0] for place, text, _ in texts[1:8:2]}
    assert list(rows) == ["cat  0", "dog  1", "eel  2", "3"]
    assert list(columns) == ["0", "1", "2", "3"]
    numbers = [
        (place[1], place[0], text)
        for place, text, _ in texts[8:]
        if len(text) == 1 and place[1] > 50
    ]
    ys, xs = list(rows.values()), list(columns.values())
    expected = [(ys[r], xs[c], str(MATRIX[r, c])) for r, c in np.argwhere(MATRIX)]
    assert numbers == expected
    assert any("4 mistakes in 7 test images" in text for _, text, _ in texts)

    def color(row: int, column: int) -> tuple[int, ...]:
        return tuple(map(int, picture[int(ys[row]) - 18, int(xs[column]) - 18]))

    # The mistakes are coloured, the diagonal is not.
    assert color(0, 0) == color(1, 1) == color(3, 3)
    assert sum(color(2, 0)) < sum(color(0, 1)) == sum(color(1, 0)) < sum(color(0, 0))


def test_a_matrix_without_mistakes_is_drawn_too(texts: Texts) -> None:
    figures.confusion_image(np.diag([3, 2, 2, 0]), list("0123"))
    assert any("0 mistakes in 7 test images" in text for _, text, _ in texts)
    assert [text for place, text, color in texts if color == "gray"] == ["3", "2", "2"]


@pytest.mark.parametrize(
    ("classes", "names", "numbers"), [(30, 30, 30), (31, 31, 0), (100, 100, 0), (101, 0, 0)]
)
def test_many_classes_are_drawn_without_numbers_or_names(
    classes: int, names: int, numbers: int, texts: Texts
) -> None:
    matrix = np.eye(classes, dtype=int)
    picture = figures.confusion_image(matrix, [f"class {i}" for i in range(classes)])
    assert sum("class " in text and "\n" not in text for _, text, _ in texts[:200]) >= names
    assert sum(color == "gray" for _, _, color in texts) == numbers
    assert (names == 0) == (len(texts) < 5)
    assert max(picture.shape) < 2500


ANY_NAMES = ("$^$", "猫", "_", "a|b\\|c", "*x* `y` <b> [red](z) &amp; #1 ~~no~~ $a$", "n" * 999)


def test_pictures_show_any_class_name() -> None:
    spec = of_classes(*ANY_NAMES)
    names = figures.drawn_names(spec, figures.TICK_CHARACTERS)
    assert names[:4] == ["$^$", "#1", "_", "a|b\\|c"]
    assert names[4:] == ["*x* `y` <b> [red](z)… #4", f"{'n' * 20}… #5"]
    matrix = np.ones((6, 6), int)
    assert figures.confusion_image(matrix, names).shape[1] < 600
    titles = figures.drawn_names(spec, figures.TITLE_CHARACTERS)
    assert figures.image_grid(np.zeros((6, 6, 5, 1), np.uint8), titles).any()


def test_cut_names_stay_different() -> None:
    names = figures.drawn_names(of_classes(*[f"{'same ' * 9}{i}" for i in range(200)]), 14)
    assert len(set(names)) == 200
    assert max(map(len, names)) == 14


def test_the_model_card_shows_any_class_name() -> None:
    table = report.class_table(np.eye(6, dtype=int), ANY_NAMES)
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
    [(1, 1, 1), (1, 1, 3), (3, 3, 4), (7, 5, 1), (7, 5, 2), (7, 5, 3), (36, 6, 1)],
)
def test_each_image_is_drawn_below_its_title(
    count: int, columns: int, channels: int, texts: Texts
) -> None:
    images = np.random.RandomState(0).randint(0, 256, (count, 6, 5, channels), dtype=np.uint8)
    titles = [f"title {i}" for i in range(count)]
    grid = figures.image_grid(images, titles)
    found = {text: place for place, text, _ in texts if text in titles}
    assert list(found) == titles
    rows = -(-count // columns)
    width, height = grid.shape[1] // columns, grid.shape[0] // rows
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = i % columns * width, i // columns * height
        assert left < found[title][0] < left + width
        assert top <= found[title][1] < top + 40
        # The image is 125 x 150 pixels, so one of its pixels is 25 x 25.
        image_top, image_left = top + 36, left + (width - 125) // 2
        shown = grid[image_top + 12 : image_top + 150 : 25, image_left + 12 : image_left + 125 : 25]
        pixels = np.repeat(image[..., :1], 3, axis=-1) if channels < 3 else image[..., :3]
        if channels == 4:  # blended with white
            alpha = image[..., 3:] / 255
            pixels = pixels * alpha + 255 * (1 - alpha)
        np.testing.assert_allclose(shown, pixels, atol=1.5)
    assert tuple(grid[0, 0]) == tuple(grid[-1, -1]) == WHITE


def test_large_images_are_reduced() -> None:
    images = np.full((1, 300, 600, 3), 7, np.uint8)
    grid = figures.image_grid(images, ["one"])
    assert grid.shape[:2] == (115, 180)
    assert (grid[40:110, 20:160] == 7).all()


def test_titles_and_images_must_have_the_same_number() -> None:
    with pytest.raises(ValueError, match="shorter"):
        figures.image_grid(np.zeros((2, 6, 5, 1), np.uint8), ["one"])


def summary(**changes: Any) -> dict[str, Any]:
    data = {"name": "fashion_mnist", "version": "3.0.1", "origin": "tensorflow-datasets"}
    sizes = {"train": 54000, "validation": 6000, "test": 10000, "fingerprint": "0123abcd" * 8}
    return {
        "data": data | sizes,
        "model": "cnn",
        "parameters": 1234567,
        "trainable_parameters": 1000000,
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


def test_the_model_card_describes_the_run() -> None:
    config = Config().with_changes({"model.options": {"units": [3], "text": 'a "b"'}})
    table = report.class_table(MATRIX, ("cat", "dog", "eel", "fox"))
    card = report.model_card(Path("my runs/20260102T030405Z-a"), summary(), table, config)
    assert card.startswith("# 20260102T030405Z-a\n")
    for text in (
        "accuracy 0.9877",
        "loss 0.0312",
        "**fashion_mnist** 3.0.1 (tensorflow-datasets)",
        f"`{'0123abcd' * 8}`",
        "`cnn` network of 1,234,567 parameters, 1,000,000 trainable.",
        "1,000 images, scored once",
        "Training: 5,400 images, epochs: 3; 6,000 more for validation",
        "CPU:0, CPU:1; precision: mixed_bfloat16; seed: 7",
        "12.3 s, 2.50 ms per step (median of 11 calls)",
        "\n| cat | 0.4000 | 0.6667 | 0.5000 | 3 |\n",
        "\n| fox | 0.0000 | 0.0000 | 0.0000 | 0 |\n",
    ):
        assert text in card
    before, commands, between, toml, after = card.split("```")
    assert tomllib.loads(toml.removeprefix("toml")) == tomllib.loads(config.to_toml())
    assert before.endswith("Score the run again, or predict the class of an image:\n\n")
    assert [shlex.split(line) for line in commands.removeprefix("sh\n").splitlines()] == [
        ["trainer", "evaluate", "my runs/20260102T030405Z-a"],
        ["trainer", "predict", "my runs/20260102T030405Z-a", "image.png"],
    ]
    assert (between, after) == ("\n\n", "\n")
    unmeasured = report.model_card(Path("a"), summary(step_ms=None, windows=0), table, Config())
    assert "12.3 s\n" in unmeasured
    assert "ms per step" not in unmeasured

    everything = Config().with_changes({"data.train_on_validation": True})
    card = report.model_card(Path("a"), summary(epochs=1), table, everything)
    assert "Training: 5,400 images, epochs: 1; including the validation images" in card
