"""Prepared data: it is read as it was written, and refused if it is damaged."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_contract import SPLITS, check_contract

from trainer.config import DataConfig
from trainer.data import fingerprint, load
from trainer.data._prepared import open_prepared, write_prepared
from trainer.data._verbs import describe
from trainer.errors import InputError


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Prepared data of 12 images for training and 4 for the test."""
    images = np.arange(16 * 20, dtype=np.uint8).reshape(16, 5, 4, 1)
    labels = np.arange(16) % 3
    write_prepared(
        tmp_path / "data" / "kept",
        name="kept",
        version="2",
        class_names=["a", "b", "c"],
        origin="a test",
        splits={
            "train": (12, (5, 4, 1), ((images[i : i + 6], labels[i : i + 6]) for i in (0, 6))),
            "test": (4, (5, 4, 1), [(images[12:], labels[12:])]),
        },
    )
    return tmp_path / "data" / "kept"


def kept(prepared: Path) -> DataConfig:
    return DataConfig(name=prepared.name, directory=str(prepared.parent))


def test_prepared_data_is_what_was_written(prepared: Path) -> None:
    config = kept(prepared)
    dataset = load(config)
    check_contract(dataset, load(config))
    assert [len(dataset.split(name)) for name in SPLITS] == [11, 1, 4]
    assert (dataset.spec.name, dataset.spec.version) == ("kept", "2")
    assert dataset.spec.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(dataset.train.images.ravel(), np.arange(240))
    np.testing.assert_array_equal(dataset.test.labels, np.arange(12, 16) % 3)
    assert isinstance(dataset.train.images, np.memmap)  # read on demand
    whole = [(split.images, split.labels) for split in (dataset.train, dataset.test)]
    assert dataset.spec.fingerprint == fingerprint(whole)
    open_prepared(prepared, checked_bytes=10**6)
    assert [path.name for path in prepared.parent.iterdir()] == ["kept"]


def test_rows_are_read_without_preadv(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = load(kept(prepared)).train
    positions = np.array([7, 0, 7])
    images, labels = train.read(positions)
    monkeypatch.delattr("os.preadv")  # as on Windows
    for found, expected in zip(train.read(positions), (images, labels), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_prepared_data_opens_without_what_prepared_it(prepared: Path) -> None:
    script = (
        "import sys\n"
        "from trainer.config import DataConfig\n"
        "from trainer.data import load\n"
        "print(load(DataConfig(name=sys.argv[1], directory=sys.argv[2])).spec.train)\n"
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, prepared.name, str(prepared.parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["11", "[]"]


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "test_images.npy"])
@pytest.mark.parametrize("fault", ["truncated", "longer", "empty", "missing", "foreign"])
def test_damaged_prepared_file_is_refused(fault: str, name: str, prepared: Path) -> None:
    path = prepared / name
    content = path.read_bytes()
    size = len(content)
    received = {"truncated": size - 1, "longer": size + 1, "empty": 0}
    if fault == "missing":
        path.unlink()
    else:
        spoilt = {"truncated": content[:-1], "longer": content + b"x", "empty": b""}
        path.write_bytes(spoilt.get(fault, (b"<html>not found</html>" * size)[:size]))
    with pytest.raises(InputError) as refused:
        load(kept(prepared))
    message = str(refused.value)
    assert str(path) in message
    if fault in received:
        assert f"{path}: expected {{'bytes': {size}, " in message
        assert f"received {{'bytes': {received[fault]}, " in message
    assert "trainer data prepare --overwrite" in message


@pytest.mark.parametrize(
    "content", [None, b"", b'{"name": "kept", ', b'{"a": 1}', b"\xff\xfe", b"[]"]
)
def test_damaged_description_of_prepared_data_is_refused(
    content: bytes | None, prepared: Path
) -> None:
    path = prepared / "prepared.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="damaged") as refused:
        load(kept(prepared))
    assert str(prepared) in str(refused.value)
    assert "trainer data prepare --overwrite" in str(refused.value)


def test_prepared_data_without_a_split_to_train_on_is_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])
    write_prepared(
        tmp_path / "kept",
        name="kept",
        version="1",
        class_names=["a", "b"],
        origin="a test",
        splits={"test": (4, (2, 2, 1), [(images, labels)])},
    )
    with pytest.raises(InputError, match=r"damaged .*missing 1 required .* 'train'"):
        load(DataConfig(name="kept", directory=str(tmp_path)))


def test_changed_byte_is_found_by_its_sum(prepared: Path) -> None:
    path = prepared / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_prepared(prepared)  # the size is right: only the checksum shows the change
    file = r"{'bytes': \d+, 'sha256': '[0-9a-f]{64}'}"
    sums = f"expected {file}, received {file}"
    with pytest.raises(InputError, match=rf"test_images\.npy: {sums}"):
        load(kept(prepared))
    streamed = kept(prepared).model_copy(update={"device_limit_mb": 0})
    load(streamed)
    with pytest.raises(InputError, match=r"test_images\.npy"):
        describe(streamed)


def test_preparing_anew_replaces_what_was_there(prepared: Path) -> None:
    (prepared / "test_labels.npy").unlink()
    images, labels = np.full((3, 2, 2, 1), 7, np.uint8), np.array([0, 1, 0])
    write_prepared(
        prepared,
        name="kept",
        version="3",
        class_names=["a", "b"],
        origin="a test",
        splits={"train": (3, (2, 2, 1), [(images, labels)])},
    )
    dataset = load(kept(prepared))
    assert (dataset.spec.version, dataset.spec.train) == ("3", 1)
    assert sorted(path.name for path in prepared.iterdir()) == [
        "prepared.json",
        "train_images.npy",
        "train_labels.npy",
    ]
    assert [path.name for path in prepared.parent.iterdir()] == ["kept"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_interrupted_preparation_leaves_nothing(stop: type[BaseException], prepared: Path) -> None:
    before = {path: path.read_bytes() for path in prepared.iterdir()}

    def batches() -> Iterator[Any]:
        yield np.zeros((2, 5, 4, 1), np.uint8), np.zeros(2, int)
        raise stop

    for name in ("kept", "new"):
        with pytest.raises(stop):
            write_prepared(
                prepared.parent / name,
                name=name,
                version="1",
                class_names=["a", "b"],
                origin="a test",
                splits={"train": (4, (5, 4, 1), batches())},
            )
    # The old data is unchanged, and no other file remains.
    assert [path.name for path in prepared.parent.iterdir()] == ["kept"]
    assert {path: path.read_bytes() for path in prepared.iterdir()} == before


@pytest.mark.parametrize("given", [3, 5])
def test_preparation_of_another_number_of_images_is_refused(given: int, tmp_path: Path) -> None:
    examples = [(np.zeros((given, 2, 2, 1), np.uint8), np.zeros(given, int))]
    with pytest.raises(InputError, match=f"expected 4 images .*, received {given} images"):
        write_prepared(
            tmp_path / "new",
            name="new",
            version="1",
            class_names=["a", "b"],
            origin="a test",
            splits={"train": (4, (2, 2, 1), examples)},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "received"),
    [
        (np.zeros((4, 2, 1, 1), np.uint8), "received 4 images, 8 bytes"),
        (np.zeros((4, 2, 2, 1), np.float32), "received 4 images, 64 bytes"),
    ],
)
def test_preparation_of_other_images_is_refused(images: Any, received: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        write_prepared(
            tmp_path / "new",
            name="new",
            version="1",
            class_names=["a"],
            origin="a test",
            splits={"train": (4, (2, 2, 1), [(images, np.zeros(4, int))])},
        )
    expected = "split 'train': expected 4 images of shape [2, 2, 1], 16 bytes"
    assert str(refused.value) == f"{expected}, {received}"
    assert list(tmp_path.iterdir()) == []
