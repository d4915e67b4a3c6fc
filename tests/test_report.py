import errno
import io
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer import figures, report
from trainer.config import Config
from trainer.data import DataSpec
from trainer.errors import InputError
from trainer.run import Run
from trainer.training.checkpoint import load_weights, save_weights

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


def sure_of(guesses: NDArray[Any], classes: int = 4) -> NDArray[Any]:
    """Returns probabilities that are 1 for the guess."""
    return np.eye(classes)[guesses]


def drawn(figure: Figure) -> bytes:
    """Returns the figure as a PNG; a warning of matplotlib is an error here."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def refused(function: Callable[..., Any], *arguments: Any) -> str:
    """Returns the message of an InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


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


def test_class_names_are_no_formulas() -> None:
    assert drawn(figures.confusion_figure(LABELS, GUESSES, of_classes("$^$", "b", "c", "d")))
    assert drawn(figures.picture_grid(np.zeros((1, 6, 5, 1), np.uint8), ["$^$"]))


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
    card = report.model_card("20260102T030405Z-a", summary(), table, config.to_toml())
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
    before, toml, after = card.split("```")
    assert tomllib.loads(toml.removeprefix("toml")) == tomllib.loads(config.to_toml())
    assert "trainer evaluate RUN" in before
    assert after == "\n"
    unmeasured = report.model_card("a", summary(step_ms=None, windows=0), table, "")
    assert "12.3 s\n" in unmeasured
    assert "ms a step" not in unmeasured


class Stubborn(keras.layers.Layer):
    """A layer in whose midst the disk is full."""

    full = False
    message = "No space left on device"

    def call(self, inputs: Any) -> Any:
        return inputs

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.full:
            raise OSError(errno.ENOSPC, self.message)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "a-run")
    run.checkpoints.mkdir(parents=True)
    return run


@pytest.fixture
def trained(compiled_model: Callable[..., Any]) -> Callable[..., keras.Model]:
    """Makes a network and an Adam whose slots are not zero."""

    def make(seed: int, **options: Any) -> keras.Model:
        model = compiled_model(optimizer=keras.optimizers.Adam, seed=seed, **options)
        model.optimizer.build(model.trainable_variables)
        random = np.random.RandomState(seed)
        gradients = [tf.constant(random.normal(size=v.shape)) for v in model.trainable_variables]
        model.optimizer.apply([tf.cast(g, tf.float32) for g in gradients])
        return model

    return make


def variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights, and every variable of the optimizer."""
    return [*model.weights, *model.optimizer.variables]


def state(model: keras.Model) -> list[bytes]:
    return [variable.numpy().tobytes() for variable in variables(model)]


def test_weights_come_back_bit_for_bit(run: Run, trained: Callable[..., keras.Model]) -> None:
    model, other = trained(0), trained(1)
    other.optimizer.apply([tf.zeros(v.shape) for v in other.trainable_variables])
    before = state(model)
    pairs = zip(variables(other), before, state(other), strict=True)
    assert [variable.name for variable, a, b in pairs if a == b] == ["learning_rate"]
    assert {"kernel", "bias", "iteration"} < {v.name for v in variables(model)}
    save_weights(run.weights, model)
    assert [p.name for p in run.checkpoints.iterdir()] == [run.weights.name]
    assert state(model) == before
    load_weights(run.weights, other)
    assert state(other) == before
    save_weights(run.weights, trained(2))  # over what was there
    load_weights(run.weights, model)
    assert state(model) == state(trained(2))


def test_what_a_layer_keeps_besides_its_weights_comes_back(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    def layers() -> list[keras.layers.Layer]:
        nested = keras.Sequential([keras.layers.Dense(8), keras.layers.Dropout(0.5)])
        twice = keras.layers.Dense(8)
        return [keras.layers.BatchNormalization(), nested, twice, twice]

    model, other = (trained(seed, own_layers=layers) for seed in (0, 1))
    model.set_weights([weight + 1 for weight in model.get_weights()])  # also means and variances
    assert len(model.weights) == 12
    save_weights(run.weights, model)
    load_weights(run.weights, other)
    assert state(other) == state(model)


def test_a_weight_that_two_layers_know_comes_back(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    def layers() -> list[keras.layers.Layer]:
        return [keras.layers.SpectralNormalization(keras.layers.Dense(8))]

    model, other = (trained(seed, own_layers=layers) for seed in (0, 1))
    save_weights(run.weights, model)
    load_weights(run.weights, other)
    assert state(other) == state(model)


# What the two architectures' optimizers say on top is of no concern here.
@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_architecture_are_refused(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    save_weights(run.weights, trained(0))
    for layers in (
        lambda: [keras.layers.Dense(7)],
        lambda: [keras.layers.Dense(8), keras.layers.Dense(8)],
        lambda: [keras.layers.Reshape((4, 2)), keras.layers.Conv1D(1, 1), keras.layers.Flatten()],
    ):
        message = refused(load_weights, run.weights, trained(0, own_layers=layers))
        assert message.startswith(f"{run.weights} cannot be read into this model: ")


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_of_a_deeper_network_are_refused(run: Run) -> None:
    def network(depth: int) -> keras.Model:
        return keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(3) for _ in range(depth))])

    save_weights(run.weights, network(2))
    refused(load_weights, run.weights, network(1))


def test_a_damaged_file_of_weights_is_refused(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    model = trained(0)
    message = refused(load_weights, run.weights, model)
    assert message.startswith(f"{run.weights} cannot be read into this model: ")
    save_weights(run.weights, model)
    whole = run.weights.read_bytes()
    for damaged in (b"", b"some text", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        run.weights.unlink()  # HDF5 knows a file it has open by its inode
        run.weights.write_bytes(damaged)
        assert str(run.weights) in refused(load_weights, run.weights, model)


def test_weights_damaged_within_are_refused(run: Run, trained: Callable[..., keras.Model]) -> None:
    model = trained(0)
    save_weights(run.weights, model)
    whole = run.weights.read_bytes()
    assert b"HEAP" in whole
    run.weights.unlink()
    run.weights.write_bytes(whole.replace(b"HEAP", b"heap"))
    assert str(run.weights) in refused(load_weights, run.weights, model)


def test_a_save_that_fails_leaves_the_former_weights(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    layer = Stubborn()
    model = trained(0, own_layers=lambda: [layer])
    save_weights(run.weights, model)
    former, before = run.weights.read_bytes(), state(model)
    layer.full = True
    model.set_weights([weight + 1 for weight in model.get_weights()])
    message = refused(save_weights, run.weights, model)
    assert message.startswith(f"{run.weights}: about ")
    assert "No space left on device" in message
    assert run.weights.read_bytes() == former
    assert [p.name for p in run.checkpoints.iterdir()] == [run.weights.name]
    load_weights(run.weights, model)
    assert state(model) == before


def test_weights_that_have_no_folder_are_refused(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    run.checkpoints.rmdir()
    run.checkpoints.write_text("a file")
    message = refused(save_weights, run.weights, trained(0))
    assert re.match(f"{re.escape(str(run.weights))}: about [1-9][0-9]* bytes cannot be", message)
    assert run.checkpoints.read_text() == "a file"


def test_a_full_disk_is_one_line(run: Run, trained: Callable[..., keras.Model]) -> None:
    layer = Stubborn()
    layer.full, layer.message = True, "file write failed: time = Fri Jan  2\n, filename = 'a'"
    refused(save_weights, run.weights, trained(0, own_layers=lambda: [layer]))
