"""A folder of images, a table and an .npz file as data sets."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from PIL import Image

from trainer import data
from trainer.config import DataConfig
from trainer.data import Dataset
from trainer.errors import InputError
from trainer.images import read_image

Refused = Callable[..., str]


def load(name: str, path: Path | str, **settings: Any) -> Dataset:
    options = {"path": str(path)} | settings.pop("options", {})
    settings = {"image_size": (32, 24), "directory": "data"} | settings
    return data.load(DataConfig(name=name, options=options, **settings))


@pytest.fixture
def refused(in_tmp_path: Path) -> Refused:
    """Loads a data set that is refused: one line, and no prepared data is left behind."""

    def check(*arguments: Any, **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            load(*arguments, **settings)
        left = [path.name for path in (in_tmp_path / "data").glob("*") if path.name != ".lock"]
        assert left == []
        message = str(caught.value)
        assert "\n" not in message
        return message

    return check


@pytest.fixture
def shapes(in_tmp_path: Path) -> Path:
    pictures.write_folder(in_tmp_path / "shapes", 9)
    return in_tmp_path / "shapes"


def check_pixels(dataset: Dataset) -> None:
    """Checks that every image equals its file, read by the one function, and has its class."""
    how, names = dataset.spec.preprocessing, dataset.spec.class_names
    assert how is not None
    for name in data.SPLITS:
        split = dataset.split(name)
        images, labels = split.read()
        assert split.files is not None
        files = [Path(split.files[row]) for row in split.rows]
        assert [names[label] for label in labels] == [file.parent.name for file in files]
        for image, file in zip(images, files, strict=True):
            np.testing.assert_array_equal(image, read_image(file, how)[0])


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_a_folder_of_classes_is_read(resize: str, shapes: Path) -> None:
    dataset = load("folder", shapes, resize=resize, background="black")
    assert dataset.spec.class_names == tuple(sorted(pictures.CLASSES))
    assert dataset.spec.name == "shapes"
    assert dataset.spec.image_shape == (32, 24, 3)
    assert [len(dataset.split(name)) for name in data.SPLITS] == [21, 3, 3]
    check_pixels(dataset)


def test_a_link_to_a_folder_above_repeats_no_image(shapes: Path) -> None:
    first = shapes / sorted(pictures.CLASSES)[0]
    (first / "again").symlink_to(first)
    dataset = load("folder", shapes)
    assert [len(dataset.split(name)) for name in data.SPLITS] == [21, 3, 3]


def test_splits_are_folders_too(in_tmp_path: Path) -> None:
    for seed, (name, count) in enumerate([("Train", 6), ("val", 2), ("test", 3)]):
        pictures.write_folder(in_tmp_path / "all" / name, count, seed=seed)
    dataset = load("folder", "all")
    assert [len(dataset.split(name)) for name in data.SPLITS] == [18, 6, 9]
    check_pixels(dataset)


def test_a_link_to_other_classes_is_refused(shapes: Path, refused: Refused) -> None:
    (shapes / "round" / "up").symlink_to("..")
    assert "up: expected no link to a folder above it, received one to" in refused("folder", shapes)


def test_special_files_are_not_read(shapes: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(shapes / "round" / "pipe.png")
    caplog.set_level("INFO", logger="trainer")
    load("folder", shapes)
    assert "ignored files that are not images: 1 special file" in caplog.text


def test_other_folders_beside_splits_are_refused(in_tmp_path: Path, refused: Refused) -> None:
    for seed, name in enumerate(["train", "val", "valid"]):
        pictures.write_folder(in_tmp_path / "all" / name, 2, seed=seed)
    assert "train, validation and test only, received valid" in refused("folder", "all")


@pytest.mark.parametrize("second", ["validation", "VAL", "Val"])
def test_two_folders_for_one_split_are_refused(
    second: str, in_tmp_path: Path, refused: Refused
) -> None:
    for seed, name in enumerate(["train", "val", second]):
        pictures.write_folder(in_tmp_path / "all" / name, 2, seed=seed)
    message = refused("folder", "all")
    assert "all: expected one folder for each split, received" in message
    assert second in message


def test_files_that_are_not_images_are_counted(
    shapes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shapes / "round" / "Thumbs.db").write_text("x")
    (shapes / "round" / "notes.TXT").write_text("x")
    (shapes / "round" / ".hidden.png").write_text("x")
    (shapes / ".cache").mkdir()
    (shapes / "empty").mkdir()
    caplog.set_level("INFO", logger="trainer")
    assert load("folder", shapes).spec.class_count == 3
    assert "shapes: ignored files that are not images: 1 .db, 1 .txt" in caplog.text


def test_color_and_size_may_come_from_the_files(in_tmp_path: Path) -> None:
    for name in ("a", "b"):
        (in_tmp_path / "gray" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((7, 5), 50 * i, np.uint8)
            Image.fromarray(pixels).save(in_tmp_path / "gray" / name / f"{i}.png")
    assert load("folder", "gray", image_size=None).spec.image_shape == (7, 5, 1)
    assert load("folder", "gray", image_size=None, color="rgb").spec.image_shape == (7, 5, 3)


def test_files_are_decoded_once(shapes: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="trainer")
    first = load("folder", shapes)
    assert "decoding 27 images" in caplog.text
    caplog.clear()
    assert load("folder", shapes).spec == first.spec
    assert "decoding" not in caplog.text
    changed = shapes / "round" / "0000.jpg"
    pictures.draw(0, 77).save(changed)
    again = load("folder", shapes)
    assert again.spec.fingerprint != first.spec.fingerprint
    check_pixels(again)
    changed.unlink()
    assert "decoding 26 images" in caplog.text or load("folder", shapes).spec.train < 21
    assert len([p for p in Path("data").iterdir() if p.is_dir()]) == 1  # replaced, not added


def test_broken_files_are_listed_or_skipped(shapes: Path, refused: Refused) -> None:
    for name in ("0001.png", "0003.webp"):
        path = shapes / "round" / name
        path.write_bytes(path.read_bytes()[:-90])
    message = refused("folder", shapes)
    assert "2 of 27 files of" in message
    assert "0001.png" in message
    assert "0003.webp" in message
    assert 'set data.options.unreadable = "skip"' in message
    dataset = load("folder", shapes, options={"unreadable": "skip"})
    assert sum(len(dataset.split(name)) for name in data.SPLITS) == 25
    check_pixels(dataset)
    check_pixels(load("folder", shapes, options={"unreadable": "skip"}))  # from the stored arrays


def test_a_folder_is_refused(shapes: Path, refused: Refused) -> None:
    assert "expected a folder of images, received 'none'" in refused("folder", "none")
    assert "expected a folder" in refused("folder", shapes / "round" / "0000.jpg")
    assert "differ in size: set data.image_size" in refused("folder", shapes, image_size=None)
    assert "at least two classes, received none" in refused("folder", shapes / "round")
    large = Image.new("1", (20_000, 20_000))
    large.save(shapes / "round" / "large.png")
    assert "at most 50000000 pixels, received more" in refused("folder", shapes)
    (shapes / "round" / "large.png").write_bytes(b"")
    assert "large.png is not an image" in refused("folder", shapes)
    (shapes / "round" / "large.png").unlink()
    (shapes / "ROUND").mkdir()
    pictures.draw(0, 1).save(shapes / "ROUND" / "a.png")
    assert "class names that differ, received 'ROUND' and 'round'" in refused("folder", shapes)
    (shapes / "ROUND").rename(shapes / unicodedata.normalize("NFD", "Stäbe"))
    assert "class names that differ" in refused("folder", shapes)
    (shapes / unicodedata.normalize("NFD", "Stäbe")).rename(shapes / "rare")
    assert "two training images of each class, received fewer of ['rare']" in refused(
        "folder", shapes
    )
    for name in pictures.CLASSES:
        shutil.rmtree(shapes / name)
    assert "at least two classes, received rare" in refused("folder", shapes)


def test_every_class_keeps_training_images(shapes: Path) -> None:
    fractions = {"validation_fraction": 0.47, "test_fraction": 0.47}
    with pytest.raises(InputError, match="of its classes are without training images"):
        load("folder", shapes, **fractions)


def test_a_table_lists_images(in_tmp_path: Path) -> None:
    table = pictures.write_table(in_tmp_path, 10)
    columns = {"image": "file", "label": "species"}
    dataset = load("table", table, options=columns | {"split": "part"})
    assert [len(dataset.split(name)) for name in data.SPLITS] == [18, 6, 6]
    check_pixels(dataset)
    held_out = load("table", table, options=columns)
    assert [len(held_out.split(name)) for name in data.SPLITS] == [24, 3, 3]
    names = [*reversed(pictures.CLASSES)]
    assert load("table", table, options=columns | {"classes": names}).spec.class_names == (*names,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("file,species", "name,species"), "has no column 'file': available: name, part, species"),
        (("round\r\n", "\r\n"), "received ''"),
        (("images/round/0000.jpg", "images/round/none.jpg"), "which is not a file"),
        (("images/round/0000.jpg", "../outside.jpg"), "a path inside"),
        (("images/round/0000.jpg", "/etc/hostname"), "a path inside"),
        ((",round,train", ",round,training"), "train, validation or test, received 'training'"),
    ],
)
def test_a_table_is_refused(
    change: tuple[str, str], message: str, in_tmp_path: Path, refused: Refused
) -> None:
    table = pictures.write_table(in_tmp_path, 4)
    (in_tmp_path.parent / "outside.jpg").touch()
    text = table.read_text()
    if change[0] == "round\r\n":
        text = text.replace(",round,", ",,")
    table.write_text(text.replace(*change))
    options = {"image": "file", "label": "species", "split": "part"}
    assert message in refused("table", table, options=options)


def test_a_table_with_unknown_labels_is_refused(in_tmp_path: Path, refused: Refused) -> None:
    table = pictures.write_table(in_tmp_path, 4)
    options = {"image": "file", "label": "species", "classes": ["round", "Stäbe"]}
    assert "received 'kleine Käfer'" in refused("table", table, options=options)
    table.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as CSV" in refused("table", table)
    assert "cannot be read as CSV" in refused("table", "none.csv")


@pytest.mark.usefixtures("in_tmp_path")
def test_arrays_are_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="trainer")
    images, labels = pictures.arrays(10)
    np.savez("a.npz", images=images, labels=labels)
    dataset = load("arrays", "a.npz", image_size=None)
    assert dataset.spec.image_shape == (32, 32, 3)
    np.testing.assert_array_equal(dataset.test.read()[0], images[dataset.test.rows])
    names = np.array(["disk", "bar", "tree"])
    floats = {"x_train": images / 255, "y_train": labels[:, np.newaxis], "class_names": names}
    np.savez("b.npz", **floats, x_test=images[::3] / 255, y_test=labels[::3])
    same = load("arrays", "b.npz", image_size=None)
    assert same.spec.class_names == ("disk", "bar", "tree")
    assert "float images in [0, 1], scaled by 255" in caplog.text
    np.testing.assert_array_equal(same.train.images, images)
    np.testing.assert_array_equal(same.test.read()[0], images[::3])
    np.savez("c.npz", images=images[..., 0].astype(np.float32), labels=labels)
    gray = load("arrays", "c.npz", image_size=(16, 16), color="rgb")
    assert gray.spec.image_shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": np.zeros(29, int)}, "as many labels as images"),
        ({"labels": np.zeros(30)}, "integer labels"),
        ({"images": np.full((30, 4, 4), np.nan)}, "values in [0, 1] or [0, 255]"),
        ({"images": np.full((30, 4, 4), -1.0)}, "values in [0, 1] or [0, 255]"),
        ({"images": np.zeros((30, 4, 4), np.int64)}, "images of type uint8 or float"),
        ({"images": np.zeros((30, 4), np.uint8)}, "images [n, height, width(, channels)]"),
        ({"images": np.array([{}] * 30, object)}, "cannot be read as .npz"),
        ({"pictures": None}, "expected images and labels, or x_train and y_train"),
    ],
)
def test_arrays_are_refused(changed: dict[str, Any], message: str, refused: Refused) -> None:
    images, labels = pictures.arrays(10, 8)
    arrays: dict[str, Any] = {"images": images, "labels": labels} | changed
    if "pictures" in changed:
        arrays = {"pictures": images, "labels": labels}
    np.savez("a.npz", **arrays)
    assert message in refused("arrays", "a.npz", image_size=None)


def test_a_file_that_is_no_archive_is_refused(refused: Refused) -> None:
    Path("a.npz").write_bytes(b"some text")
    assert "cannot be read as .npz" in refused("arrays", "a.npz")
    np.save("b.npy", np.zeros(3))
    assert "cannot be read as .npz" in refused("arrays", "b.npy")
    assert "cannot be read as .npz" in refused("arrays", "none.npz")
