"""What every data set keeps to, found by itself; where it comes from; and what is refused."""

import gzip
import hashlib
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds

import trainer.data
import trainer.data.tfds
from trainer.config import DataConfig
from trainer.data import Dataset, Split, fingerprint, load, names
from trainer.data._prepared import PARTIAL, check_sums, open_prepared, write_prepared
from trainer.errors import InputError

SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------- what every data set keeps to


def check_contract(dataset: Dataset, again: Dataset) -> None:
    """Checks what networks, the loop and reports rely on."""
    spec = dataset.spec
    assert spec == again.spec  # the fingerprint among it
    assert re.fullmatch("[0-9a-f]{64}", spec.fingerprint)
    assert spec.name
    assert spec.version
    assert spec.origin
    assert spec.class_count == len(spec.class_names) == len(set(spec.class_names)) >= 2
    assert len(spec.image_shape) == 3
    for name in SPLITS:
        split = dataset.split(name)
        assert len(split) == getattr(spec, name) > 0
        images, labels = split.read()
        assert images.dtype == np.uint8
        assert images.shape == (len(split), *spec.image_shape)
        assert split.nbytes == images.nbytes
        assert labels.dtype == np.int32
        assert labels.shape == (len(split),)
        assert 0 <= labels.min() <= labels.max() < spec.class_count
        assert images.max() > images.min()
        some = np.array([len(split) - 1, 0])
        np.testing.assert_array_equal(split.read(some)[0], images[some])
        np.testing.assert_array_equal(split.read(slice(0, 2))[1], labels[:2])
        np.testing.assert_array_equal(again.split(name).rows, split.rows)
    check_disjoint(dataset)


def check_disjoint(dataset: Dataset) -> None:
    """No image is in two splits, and none is left out."""
    by_array: dict[int, list[Split]] = {}
    for name in SPLITS:
        split = dataset.split(name)
        by_array.setdefault(id(split.images), []).append(split)
    assert any(dataset.train in splits for splits in by_array.values())
    for splits in by_array.values():
        rows = np.concatenate([split.rows for split in splits])
        assert len(np.unique(rows)) == len(rows)
        assert np.array_equal(np.sort(rows), np.arange(len(splits[0].images)))


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], tuple[Dataset, Dataset]]:
    """Loads a data set twice, once for all tests."""
    known: dict[str, tuple[Dataset, Dataset]] = {}

    def get(name: str) -> tuple[Dataset, Dataset]:
        if name not in known:
            known[name] = (load(DataConfig(name=name)), load(DataConfig(name=name)))
        return known[name]

    return get


Loaded = Callable[[str], tuple[Dataset, Dataset]]


@pytest.mark.parametrize("name", names())
def test_every_module_keeps_the_contract(name: str, loaded: Loaded) -> None:
    check_contract(*loaded(name))


@pytest.mark.parametrize("name", names())
def test_every_module_refuses_an_option_it_does_not_know(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.options.*: unknown option 'no_such': \S"):
        load(DataConfig(name=name, options={"no_such": 1}))


def test_tfds_is_no_data_set_of_its_own() -> None:
    assert {"mnist_sample", "synthetic"} <= set(names())
    assert "tfds" not in names()
    assert not any(name.startswith("_") for name in names())


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a module named `own` among the data sets: 20 images of 4 x 3, altered by one line."""

    def write(line: str) -> None:
        (tmp_path / "own.py").write_text(
            "import numpy as np\n"
            "from trainer.data import Source\n"
            "def load(config, *, factor: int = 1):\n"
            "    images = np.arange(240, dtype=np.uint8).reshape(20, 4, 3, 1) // factor\n"
            "    labels, test, validation = np.arange(20) % 2, None, None\n"
            f"    {line}\n"
            "    train = images, labels\n"
            "    return Source('own', '1', ['even', 'odd'], train, test, validation)\n"
        )
        monkeypatch.setattr(trainer.data, "__path__", [*trainer.data.__path__, str(tmp_path)])

    yield write
    sys.modules.pop("trainer.data.own", None)
    vars(trainer.data).pop("own", None)


def test_a_new_module_is_a_data_set(own_module: Callable[[str], None]) -> None:
    own_module("pass")
    assert "own" in names()
    config = DataConfig(name="own", options={"factor": 2}, test_fraction=0.2)
    dataset = load(config)
    check_contract(dataset, load(config))
    assert [len(dataset.split(name)) for name in SPLITS] == [14, 2, 4]
    assert dataset.spec.image_shape == (4, 3, 1)
    assert dataset.train.images.max() == 119  # halved, as the option says
    with pytest.raises(InputError, match="unknown option 'facto': did you mean 'factor'"):
        load(DataConfig(name="own", options={"facto": 2}))


def test_splits_that_are_given_are_left_as_they_are(own_module: Callable[[str], None]) -> None:
    own_module(
        "test, validation, images, labels = "
        "(images[:3], labels[:3]), (images[3:8], labels[3:8]), images[8:], labels[8:]"
    )
    dataset = load(DataConfig(name="own", split_seed=9))
    assert [len(dataset.split(name)) for name in SPLITS] == [12, 5, 3]
    whole = np.concatenate([dataset.split(n).read()[0] for n in ("test", "validation", "train")])
    np.testing.assert_array_equal(whole.ravel(), np.arange(240))
    given = [dataset.split(name).read() for name in SPLITS]
    assert dataset.spec.fingerprint == fingerprint(given)
    assert dataset.spec.fingerprint != fingerprint(given[:1])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "images = images / 255",
            "data set 'own', train: expected images as uint8 [n, height, width, channels], "
            "received float64 [20, 4, 3, 1]",
        ),
        ("images = images[..., 0]", "received uint8 [20, 4, 3]"),
        ("labels = labels[:-1]", "received 20 images and labels of shape [19]"),
        ("labels = np.eye(2, dtype=int)[labels]", "received 20 images and labels of shape [20, 2]"),
        ("labels = labels / 1", "expected integer labels, received float64"),
        ("labels = labels + 1", "expected labels from 0 to 1, received 1 to 2"),
        ("labels = labels - 1", "expected labels from 0 to 1, received -1 to 0"),
        ("images, labels = images[:0], labels[:0]", "at least one, received 0 images"),
        (
            "test = images[:5], labels[:4]",
            "data set 'own', test: expected as many labels as images",
        ),
        (
            "test = images[:5, :2], labels[:5]",
            "data set 'own', test: expected images of shape [4, 3, 1] as in train, "
            "received [2, 3, 1]",
        ),
        ("validation = images[:5], labels[:5] + 7", "data set 'own', validation: expected labels"),
        ("images, labels = images[:2], labels[:2]", "none of its 2 training images is left"),
    ],
)
def test_arrays_that_a_network_could_learn_only_by_mistake_are_refused(
    line: str, expected: str, own_module: Callable[[str], None]
) -> None:
    own_module(line)
    with pytest.raises(InputError) as refused:
        load(DataConfig(name="own"))
    assert expected in str(refused.value)


def test_fingerprint_tells_contents_apart() -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 4, 3, 1)
    labels = np.array([0, 1])
    original = fingerprint([(images, labels)])
    changed = images.copy()
    changed[1, 3, 2, 0] += 1
    others = [
        fingerprint([(changed, labels)]),
        fingerprint([(images, labels[::-1])]),
        fingerprint([(images[::-1], labels)]),
        fingerprint([(images[::-1], labels[::-1])]),  # the same images in another order
        fingerprint([(images[:1], labels[:1])]),
        fingerprint([(images, labels), (images, labels)]),
    ]
    assert len({original, *others}) == 7
    # ... whatever the type of the labels, and however the array lies in memory.
    assert fingerprint([(np.asfortranarray(images), labels.astype(np.uint8))]) == original


def synthetic(**options: Any) -> Dataset:
    return load(DataConfig(name="synthetic", options={"examples": 50, **options}))


def test_other_contents_have_another_fingerprint(loaded: Loaded) -> None:
    prints = [
        dataset.spec.fingerprint
        for dataset in (
            synthetic(),
            synthetic(seed=1),
            synthetic(examples=51),
            synthetic(height=27),
            loaded("mnist_sample")[0],
        )
    ]
    assert len(set(prints)) == len(prints)
    # What is held out is no matter of the contents.
    config = DataConfig(name="synthetic", options={"examples": 50}, split_seed=3)
    assert load(config).spec.fingerprint == prints[0]


def test_validation_is_drawn_by_its_seed() -> None:
    def held_out(seed: int, fraction: float = 0.25) -> list[int]:
        config = DataConfig(
            name="synthetic",
            options={"examples": 50},
            split_seed=seed,
            validation_fraction=fraction,
        )
        dataset = load(config)
        check_disjoint(dataset)
        rows: list[int] = dataset.validation.rows.tolist()
        return rows

    # Part of what a seed promises: under every version of numpy, these rows of 40.
    assert held_out(0) == [4, 10, 11, 15, 18, 20, 22, 25, 28, 29]
    assert held_out(0) == held_out(0)
    assert held_out(1) != held_out(0)
    assert len(held_out(0, 0.1)) == 4
    assert len(held_out(0, 0.001)) == 1  # at least one


# ---------------------------------------------------------------- the modules


def test_synthetic_is_as_large_as_its_options_say() -> None:
    dataset = synthetic(examples=100, height=5, width=6, channels=3, classes=4, seed=2)
    assert dataset.spec.image_shape == (5, 6, 3)
    assert dataset.spec.class_count == 4
    assert (dataset.spec.train, dataset.spec.validation, dataset.spec.test) == (72, 8, 20)
    assert set(dataset.train.labels) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exampels": 100}, "unknown option 'exampels': did you mean 'examples'?"),
        ({"examples": "many"}, "examples: expected a valid integer, received 'many'"),
        ({"examples": 9}, "examples: expected greater than or equal to 10, received 9"),
        ({"classes": 1}, "classes: expected greater than or equal to 2, received 1"),
    ],
)
def test_wrong_option_is_refused_by_its_name(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as refused:
        load(DataConfig(name="synthetic", options=options))
    assert "data.options" in str(refused.value)
    assert expected in str(refused.value)


def test_synthetic_can_be_learned() -> None:
    dataset = load(DataConfig(name="synthetic"))
    images, labels = dataset.train.read()
    means = np.stack([images[labels == label].mean(axis=0).ravel() for label in range(10)])
    images, labels = dataset.test.read()
    distances = ((images.reshape(200, 1, -1) - means) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == labels).mean() > 0.95


def test_mnist_sample_has_every_digit_alike(loaded: Loaded) -> None:
    dataset = loaded("mnist_sample")[0]
    assert dataset.spec.image_shape == (28, 28, 1)
    assert dataset.spec.class_names == tuple("0123456789")
    assert (dataset.spec.train, dataset.spec.validation, dataset.spec.test) == (3600, 400, 1000)
    counts = [
        np.bincount(np.concatenate([dataset.split(name).read()[1] for name in some]))
        for some in (("train", "validation"), ("test",))
    ]
    np.testing.assert_array_equal(counts, [[400] * 10, [100] * 10])
    everything = np.concatenate([dataset.split(name).read()[0] for name in SPLITS])
    assert len({image.tobytes() for image in everything}) == 5000
    # White ink over the whole range of a byte, on a black ground that is most of the picture.
    assert everything.max() == 255
    assert everything[:, 0].max() == 0
    assert 0.7 < (everything == 0).mean() < 0.9


def read_archives(folder: Path, part: str) -> set[tuple[bytes, int]]:
    """Returns each image of MNIST, as bytes, with its label, from the original archives."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def examples_of(split: Split) -> list[tuple[bytes, int]]:
    """Returns each image of a split, as bytes, with its label."""
    images, labels = split.read()
    return [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.mark.all_of_mnist
def test_mnist_sample_is_from_the_training_set(mnist_files: Path, loaded: Loaded) -> None:
    dataset = loaded("mnist_sample")[0]
    sample = {example for name in SPLITS for example in examples_of(dataset.split(name))}
    assert len(sample) == 5000
    assert sample <= read_archives(mnist_files, "train")
    held_out = {image for image, _ in read_archives(mnist_files, "t10k")}
    assert not held_out & {image for image, _ in sample}


@pytest.mark.all_of_mnist
def test_all_of_mnist_from_its_archives(mnist_files: Path, prepared_mnist: Path) -> None:
    config = DataConfig(name="mnist", directory=str(prepared_mnist))
    dataset = load(config)
    check_contract(dataset, load(config))
    assert (dataset.spec.name, dataset.spec.image_shape) == ("mnist", (28, 28, 1))
    assert (dataset.spec.train, dataset.spec.validation, dataset.spec.test) == (54000, 6000, 10000)
    assert dataset.spec.class_names == tuple("0123456789")
    together = examples_of(dataset.train) + examples_of(dataset.validation)
    assert len(together) == 60000
    assert set(together) == read_archives(mnist_files, "train")
    assert set(examples_of(dataset.test)) == read_archives(mnist_files, "t10k")
    assert check_sums(prepared_mnist / "mnist")


# ---------------------------------------------------------------- prepared data


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
    assert isinstance(dataset.train.images, np.memmap)  # read when it is needed
    whole = [(split.images, split.labels) for split in (dataset.train, dataset.test)]
    assert dataset.spec.fingerprint == fingerprint(whole)
    assert len(check_sums(prepared)) == 4
    assert [path.name for path in prepared.parent.iterdir()] == ["kept"]


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
    received = {"truncated": f"{size - 1} bytes", "longer": f"{size + 1} bytes"}
    received |= {"empty": "0 bytes", "missing": "no such file", "foreign": ""}
    if fault == "missing":
        path.unlink()
    else:
        spoilt = {"truncated": content[:-1], "longer": content + b"x", "empty": b""}
        path.write_bytes(spoilt.get(fault, (b"<html>not found</html>" * size)[:size]))
    with pytest.raises(InputError) as refused:
        load(kept(prepared))
    message = str(refused.value)
    if fault == "foreign":
        assert str(prepared) in message
    else:
        assert f"{path}: expected {size} bytes, received {received[fault]}" in message
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
    with pytest.raises(InputError, match="no train images"):
        load(DataConfig(name="kept", directory=str(tmp_path)))


def test_changed_byte_is_found_by_its_sum(prepared: Path) -> None:
    path = prepared / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_prepared(prepared)  # of the right size: only the sum tells
    with pytest.raises(InputError, match=r"test_images\.npy: expected sha256 [0-9a-f]{64}, found"):
        check_sums(prepared)


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
    # What was there is as it was, and nothing is beside it.
    assert [path.name for path in prepared.parent.iterdir()] == ["kept"]
    assert {path: path.read_bytes() for path in prepared.iterdir()} == before


@pytest.mark.parametrize("given", [3, 5])
def test_preparation_of_another_number_of_images_is_refused(given: int, tmp_path: Path) -> None:
    examples = [(np.zeros((given, 2, 2, 1), np.uint8), np.zeros(given, int))]
    with pytest.raises(InputError, match=f"'train': expected 4 images, received {given}"):
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
        (np.zeros((4, 2, 1, 1), np.uint8), "uint8 [2, 1, 1]"),
        (np.zeros((4, 2, 2, 1), np.float32), "float32 [2, 2, 1]"),
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
    assert str(refused.value).endswith(f"of shape [2, 2, 1], received {received}")
    assert list(tmp_path.iterdir()) == []


def test_preparation_into_a_place_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*data\.directory"):
        write_prepared(
            tmp_path / "file" / "new",
            name="new",
            version="1",
            class_names=["a", "b"],
            origin="a test",
            splits={},
        )


# ---------------------------------------------------------------- tensorflow-datasets


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """40 pictures of one colour and of differing size, without a test split."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["red", "green", "blue", "grey"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[Any]:
        for i in range(40):
            image = np.zeros((6 + i % 5, 4 + i % 7, 3), np.uint8)
            image[..., i % 4 if i % 4 < 3 else slice(None)] = 100 + i
            yield i, {"image": image, "label": i % 4}


class TinyStripes(TinyPictures):
    """Grey pictures of one size: stripes of one pixel, alternately black and nearly white."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(16, 16, 1)),
            "label": tfds.features.ClassLabel(names=["upright", "lying"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _generate_examples(self) -> Iterator[Any]:
        for i in range(20):
            image = np.zeros((16, 16, 1), np.uint8)
            image[:, ::2] = 240
            yield i, {"image": image if i % 2 == 0 else image.transpose(1, 0, 2), "label": i % 2}


class TinySentences(TinyPictures):
    """No images."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("text", "label"),
        )


class TinyUnsupervised(TinyPictures):
    """Pictures that do not say what is to be learned."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)


def free_port() -> int:
    """Returns a port of the loopback interface on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def through_proxy(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Sends every request to a port of the loopback interface, whatever network there is."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{port}")
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies it first met


@pytest.fixture
def closed_network(monkeypatch: pytest.MonkeyPatch, no_archives: None) -> None:  # noqa: ARG001
    """A machine without a network, without archives and with nothing prepared."""
    through_proxy(monkeypatch, free_port())


@pytest.fixture
def mute_network(monkeypatch: pytest.MonkeyPatch, no_archives: None) -> Iterator[None]:  # noqa: ARG001
    """A network that takes every request and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        through_proxy(monkeypatch, listener.getsockname()[1])
        yield


@pytest.fixture
def pictures(tmp_path: Path, closed_network: None) -> DataConfig:  # noqa: ARG001
    """TinyPictures, as tensorflow-datasets itself prepares it, in our folder."""
    prepare_by_tfds("tiny_pictures", tmp_path / "tensorflow_datasets")
    return DataConfig(name="tiny_pictures", directory=str(tmp_path), image_size=(3, 5))


def prepare_by_tfds(name: str, folder: Path) -> None:
    tfds.disable_progress_bar()
    options = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.builder(name, data_dir=str(folder)).download_and_prepare(download_config=options)


def test_a_set_of_tfds_is_decoded_resized_and_held_out(
    pictures: DataConfig, tmp_path: Path
) -> None:
    dataset = load(pictures)
    shutil.rmtree(
        tmp_path / "tensorflow_datasets"
    )  # what was decoded is kept: nothing else is read
    check_contract(dataset, load(pictures))
    spec = dataset.spec
    assert (spec.name, spec.version, spec.image_shape) == ("tiny_pictures", "1.2.3", (3, 5, 3))
    assert spec.class_names == ("red", "green", "blue", "grey")
    assert (spec.train, spec.validation, spec.test) == (32, 4, 4)
    assert dataset.test.images is dataset.train.images  # held out, since the set has no test split
    # A picture of one colour is of that colour at any size, and the colour tells the label.
    values = []
    for split in map(dataset.split, SPLITS):
        for image, label in zip(*split.read(), strict=True):
            value = image.max()
            expected = np.zeros((3, 5, 3), np.uint8)
            expected[..., label if label < 3 else slice(None)] = value
            np.testing.assert_array_equal(image, expected)
            assert (value - 100) % 4 == label
            values.append(int(value))
    assert sorted(values) == list(range(100, 140))


@pytest.mark.usefixtures("closed_network")
def test_resizing_averages_and_no_size_leaves_images_as_they_are(tmp_path: Path) -> None:
    prepare_by_tfds("tiny_stripes", tmp_path / "tensorflow_datasets")
    config = DataConfig(name="tiny_stripes", directory=str(tmp_path))
    images, labels = load(config).train.read()
    stripes = np.tile(np.array([240, 0], np.uint8), (16, 8))
    for image, label in zip(images[..., 0], labels, strict=True):
        np.testing.assert_array_equal(image, stripes if label == 0 else stripes.T)
    # Single pixels would give black or white here and there; their mean is grey.
    small = load(config.model_copy(update={"image_size": (5, 5)})).train.read()[0]
    assert small.shape[1:] == (5, 5, 1)
    assert abs(small.astype(float) - 120).max() < 30


def test_another_size_is_another_preparation(pictures: DataConfig) -> None:
    other = pictures.model_copy(update={"image_size": (2, 2)})
    assert load(pictures).spec.image_shape == (3, 5, 3)
    assert load(other).spec.image_shape == (2, 2, 3)
    assert load(pictures).spec.fingerprint != load(other).spec.fingerprint


def test_a_set_in_the_folder_of_tfds_itself_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed_network: None,  # noqa: ARG001
) -> None:
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "theirs"))
    prepare_by_tfds("tiny_pictures", tmp_path / "theirs")
    directory = str(tmp_path / "ours")
    spec = load(DataConfig(name="tiny_pictures", directory=directory, image_size=(2, 2))).spec
    assert (spec.name, spec.train) == ("tiny_pictures", 32)


def test_images_that_differ_in_size_need_one(pictures: DataConfig) -> None:
    config = pictures.model_copy(update={"image_size": None})
    with pytest.raises(
        InputError, match=r"differ in size: set data\.image_size = \[height, width\]"
    ):
        load(config)


@pytest.mark.parametrize("fault", ["truncated", "empty", "missing"])
def test_damaged_files_of_tfds_are_refused(
    fault: str, pictures: DataConfig, tmp_path: Path
) -> None:
    (file,) = (tmp_path / "tensorflow_datasets").rglob("*.tfrecord*")
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(
            file.read_bytes()[: file.stat().st_size // 2 if fault == "truncated" else 0]
        )
    with pytest.raises(InputError) as refused:
        load(pictures)
    message = str(refused.value)
    assert "\n" not in message
    assert f"'tiny_pictures' in {tmp_path}" in message
    assert "damaged" in message
    assert {path.name for path in tmp_path.iterdir()} == {"tensorflow_datasets", ".lock"}


def test_of_two_processes_one_prepares_and_the_other_waits(
    pictures: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(pictures).spec
    folder, aside = tmp_path / "tiny_pictures-3x5", tmp_path / "aside"
    folder.rename(aside)
    written = (aside / "prepared.json").stat().st_mtime_ns
    caplog.set_level(logging.INFO, logger="trainer")
    with ThreadPoolExecutor(1) as thread, filelock.FileLock(tmp_path / ".lock"):
        loaded = thread.submit(load, pictures)
        while "another process prepares data" not in caplog.text:
            assert not loaded.done()
            time.sleep(0.01)
        time.sleep(0.1)
        assert not folder.exists()
        aside.rename(folder)  # the other one is done
    assert loaded.result().spec == expected
    assert (folder / "prepared.json").stat().st_mtime_ns == written


def test_what_a_killed_preparation_left_is_removed(pictures: DataConfig, tmp_path: Path) -> None:
    left = tmp_path / f"{PARTIAL}mnist-abc"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    # A person's own, for whom this folder of tensorflow-datasets is home.
    theirs = tmp_path / "tensorflow_datasets" / "downloads" / "manual" / "ILSVRC.tar"
    theirs.parent.mkdir(parents=True)
    (tmp_path / ".partial-mine").write_bytes(b"mine")
    theirs.write_bytes(b"theirs")
    load(pictures)
    assert not left.exists()
    assert theirs.read_bytes() == b"theirs"
    assert (tmp_path / ".partial-mine").read_bytes() == b"mine"


def test_prepared_data_of_another_set_is_refused(pictures: DataConfig, tmp_path: Path) -> None:
    load(pictures)
    (tmp_path / "tiny_pictures-3x5").rename(tmp_path / "mnist")
    with pytest.raises(InputError, match="of 'mnist', found that of 'tiny_pictures'"):
        load(DataConfig(name="mnist", directory=str(tmp_path)))


@pytest.mark.parametrize("name", ["tiny_sentences", "tiny_unsupervised", "imdb_reviews"])
@pytest.mark.usefixtures("closed_network")
def test_a_set_that_is_no_image_classification_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"'{name}': expected an image and a class label, received"
    ):
        load(DataConfig(name=name, directory=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minst", "did you mean 'mnist'?"),
        ("fashion_minst", "did you mean 'fashion_mnist'?"),
        ("synthetc", "did you mean 'synthetic'?"),
    ],
)
@pytest.mark.usefixtures("closed_network")
def test_unknown_set_is_refused_with_the_nearest(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"unknown data set '{name}'") as refused:
        load(DataConfig(name=name, directory=str(tmp_path)))
    assert expected in str(refused.value)


@pytest.mark.parametrize("name", ["mnist:9.9.9", "cifar10/plain"])
@pytest.mark.usefixtures("closed_network")
def test_unknown_version_or_variant_of_a_set_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"data set '{name}' cannot be opened") as refused:
        load(DataConfig(name=name, directory=str(tmp_path)))
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("closed_network")
def test_a_set_of_tfds_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown option 'split': it takes none"):
        load(DataConfig(name="mnist", directory=str(tmp_path), options={"split": "x"}))


def mnist(directory: Path, **options: Any) -> DataConfig:
    return DataConfig(name="mnist", directory=str(directory), **options)


@pytest.mark.parametrize("network", ["closed_network", "mute_network"])
def test_without_a_network_mnist_is_a_sample_within_ten_seconds(
    network: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    loaded: Loaded,
) -> None:
    sample = loaded("mnist_sample")[0].spec
    request.getfixturevalue(network)
    started = time.monotonic()
    dataset = load(mnist(tmp_path))
    # The limit that a person at a closed network waits, not a measure of speed: without a
    # time-out of its own the request would wait for minutes.
    assert time.monotonic() - started < 10
    assert dataset.spec == sample
    (warning,) = [
        r for r in caplog.records if r.name.startswith("trainer") and r.levelname == "WARNING"
    ]
    assert "SAMPLE" in warning.getMessage()
    assert "TRAINER_DATA_FILES" in warning.getMessage()
    # Nothing is kept that would be taken for MNIST the next time.
    assert not (tmp_path / "mnist").exists()


@pytest.mark.parametrize(("answer_seconds", "probe_seconds"), [(0.2, 60.0), (60.0, 0.2)])
@pytest.mark.usefixtures("mute_network")
def test_both_time_outs_end_the_waiting(
    answer_seconds: float,
    probe_seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # That of the request, and another, as a look-up of a name can hang where the first is deaf.
    monkeypatch.setattr(trainer.data.tfds, "_ANSWER_SECONDS", answer_seconds)
    monkeypatch.setattr(trainer.data.tfds, "_PROBE_SECONDS", probe_seconds)
    started = time.monotonic()
    with pytest.raises(InputError, match="does not answer"):
        load(mnist(tmp_path, allow_sample=False))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "fashion_mnist"}, "data set 'fashion_mnist' is not to be had"),
        ({"name": "mnist", "allow_sample": False}, r"'mnist' .*\(data\.allow_sample = false\)"),
    ],
)
@pytest.mark.usefixtures("closed_network")
def test_without_a_network_other_sets_are_refused(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected) as refused:
        load(DataConfig(directory=str(tmp_path), **options))
    assert "TRAINER_DATA_FILES" in str(refused.value)
    assert "does not answer" in str(refused.value)


ARCHIVES = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]
ERROR_PAGE = b"<html>403 Forbidden</html>"


@pytest.fixture(params=["data.files", "TRAINER_DATA_FILES"])
def give(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    closed_network: None,  # noqa: ARG001
) -> Callable[[Path], DataConfig]:
    """Names a folder of archives, by the configuration or by the environment."""

    def configure(folder: Path) -> DataConfig:
        if request.param == "data.files":
            return mnist(tmp_path / "data", files=str(folder))
        monkeypatch.setenv("TRAINER_DATA_FILES", str(folder))
        return mnist(tmp_path / "data")

    return configure


@pytest.mark.parametrize("inside", ["", "mnist"])
def test_damaged_archive_is_refused_with_size_and_sums(
    inside: str, give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "archives" / inside
    folder.mkdir(parents=True)
    for name in ARCHIVES:
        (folder / name).write_bytes(ERROR_PAGE)
    with pytest.raises(InputError) as refused:
        load(give(tmp_path / "archives"))
    message = str(refused.value)
    (named,) = [name for name in ARCHIVES if str(folder / name) in message]
    assert f"it has {len(ERROR_PAGE)} bytes, expected " in message
    assert f"its sha256 is {hashlib.sha256(ERROR_PAGE).hexdigest()}" in message
    sums = {  # how each begins
        "train-images-idx3-ubyte.gz": "440fcabf73cc546f",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d",
    }
    assert f"expected {sums[named]}" in message
    assert not (tmp_path / "data" / "mnist").exists()


def test_folder_that_lacks_an_archive_is_refused(
    give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    (tmp_path / "archives").mkdir()
    for name in ARCHIVES[:-1]:
        (tmp_path / "archives" / name).write_bytes(ERROR_PAGE)
    with pytest.raises(InputError, match=rf"archives \(.*\) lacks {ARCHIVES[-1]} of mnist"):
        load(give(tmp_path / "archives"))


def test_folder_that_does_not_exist_is_refused(
    give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"(data\.files|TRAINER_DATA_FILES) = .*no such folder"):
        load(give(tmp_path / "archives"))


def test_folder_without_any_archive_is_refused_or_noticed(
    give: Callable[[Path], DataConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "archives"
    (folder / "mnist").mkdir(parents=True)
    (folder / "notes.txt").write_text("nothing here")
    config = give(folder).model_copy(update={"allow_sample": False})
    with pytest.raises(InputError) as refused:
        load(config)
    if config.files:  # named for this very set
        expected = ", ".join(sorted(ARCHIVES))
        assert str(refused.value) == (
            f"{folder} (data.files) holds no archive of mnist: expected {expected}"
        )
    else:
        assert re.search("not prepared in .*no archives were given", str(refused.value))
        (notice,) = [
            record.getMessage()
            for record in caplog.records
            if record.levelno == logging.WARNING and record.name.startswith("trainer")
        ]
        assert (
            notice == f"{folder} (TRAINER_DATA_FILES) holds no archive of mnist and is passed over."
        )


def test_an_empty_folder_of_its_name_hides_no_archive(
    give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    (tmp_path / "archives" / "mnist").mkdir(parents=True)
    for name in ARCHIVES:
        (tmp_path / "archives" / name).write_bytes(ERROR_PAGE)
    with pytest.raises(InputError, match="is not the archive that mnist was made from"):
        load(give(tmp_path / "archives"))


@pytest.mark.usefixtures("no_archives", "closed_network")
def test_what_was_not_prepared_here_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"the only copy")
    config = DataConfig(name="mnist", directory=str(tmp_path / "data"))
    for act in (load, trainer.data.tfds.prepare):
        with pytest.raises(InputError, match="nothing was touched"):
            act(config)
    assert precious.read_bytes() == b"the only copy"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mnist"]


def test_rows_of_a_file_are_read_in_any_order_and_a_shortened_file_is_refused(
    tmp_path: Path,
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 2, 1), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    split = Split(mapped, np.arange(50, dtype=np.int32), np.arange(10, 50))

    for positions in ([7, 3, 4, 5, 5, 39, 0], [], [39, 38]):
        found, labels = split.read(np.array(positions, np.int64))
        np.testing.assert_array_equal(found, images[10:][positions])
        assert labels.tolist() == [10 + position for position in positions]
    np.testing.assert_array_equal(split.read()[0], images[10:])

    with (tmp_path / "images.npy").open("r+b") as file:
        file.truncate(mapped.offset + 20 * 6)
    with pytest.raises(InputError, match=r"images.npy: expected 12 bytes of images, read 6"):
        split.read(np.array([9, 12]))
