"""Data sets of tensorflow-datasets, prepared once from archives, the network or its own files."""

import hashlib
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import filelock
import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_contract import SPLITS, check_contract

import trainer.data
import trainer.data.tfds
from trainer.config import DataConfig
from trainer.data import load
from trainer.data._prepared import PARTIAL
from trainer.errors import InputError


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """40 pictures of one colour each and of different sizes, without a test split."""

    VERSION = tfds.core.Version("1.2.3")
    IMAGE: Any = tfds.features.Image(shape=(None, None, 3))
    LABEL: Any = tfds.features.ClassLabel(names=["red", "green", "blue", "grey"])

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": self.IMAGE, "label": self.LABEL}
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

    IMAGE = tfds.features.Image(shape=(16, 16, 1))
    LABEL = tfds.features.ClassLabel(names=["upright", "lying"])

    def _generate_examples(self) -> Iterator[Any]:
        for i in range(20):
            image = np.zeros((16, 16, 1), np.uint8)
            image[:, ::2] = 240
            yield i, {"image": image if i % 2 == 0 else image.transpose(1, 0, 2), "label": i % 2}


class TinyFloats(TinyPictures):
    """Pictures of floating-point numbers."""

    IMAGE = tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)


class TinyFilms(TinyPictures):
    """Animations."""

    IMAGE = tfds.features.Image(shape=(None, 4, 4, 3))


class TinyCompetition(TinyStripes):
    """Stripes with a test split whose labels are secret."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:  # noqa: ARG002
        secret = ((i, example | {"label": -1}) for i, example in self._generate_examples())
        return {"train": self._generate_examples(), "test": secret}


class TinyUninstalled(TinyStripes, skip_registration=True):
    """The class is not in the catalog when its files are read."""

    BUILDER_CONFIGS: ClassVar[list[Any]] = [
        tfds.core.BuilderConfig(name="wide", version="1.2.3"),
        tfds.core.BuilderConfig(name="narrow", version="1.2.3"),
    ]


class TinySentences(TinyPictures):
    """Text instead of images."""

    IMAGE = tfds.features.Text()


class TinyUnsupervised(TinyPictures):
    """Pictures without a label to learn."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)


def free_port() -> int:
    """Returns a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def through_proxy(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Sends every request to a port of the loopback interface, with or without a network."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{port}")
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it stores the first proxies


@pytest.fixture
def closed_network(monkeypatch: pytest.MonkeyPatch, no_archives: None) -> None:  # noqa: ARG001
    """A machine without network, archives and prepared data."""
    through_proxy(monkeypatch, free_port())


@pytest.fixture
def mute_network(monkeypatch: pytest.MonkeyPatch, no_archives: None) -> Iterator[None]:  # noqa: ARG001
    """A network that accepts every request and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        through_proxy(monkeypatch, listener.getsockname()[1])
        yield


@pytest.fixture
def pictures(tmp_path: Path, closed_network: None) -> DataConfig:  # noqa: ARG001
    """TinyPictures, prepared by tensorflow-datasets in our folder."""
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
    # Only the decoded arrays are read.
    shutil.rmtree(tmp_path / "tensorflow_datasets")
    check_contract(dataset, load(pictures))
    spec = dataset.spec
    assert (spec.name, spec.version, spec.image_shape) == ("tiny_pictures", "1.2.3", (3, 5, 3))
    assert spec.class_names == ("red", "green", "blue", "grey")
    assert (spec.train, spec.validation, spec.test) == (32, 4, 4)
    assert dataset.test.images is dataset.train.images  # held out: there is no test split
    # Resizing does not change a picture of one colour, and the colour shows the label.
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
def test_a_test_split_without_labels_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_by_tfds("tiny_competition", tmp_path / "tensorflow_datasets")
    config = DataConfig(name="tiny_competition", directory=str(tmp_path))
    dataset = load(config)
    check_contract(dataset, load(config))
    assert [len(dataset.split(name)) for name in SPLITS] == [16, 2, 2]
    warnings = {
        r.getMessage()
        for r in caplog.records
        if r.levelname == "WARNING" and r.name.startswith("trainer")
    }
    assert warnings == {
        "The test split of tiny_competition has no labels: test images are held out of train "
        "instead."
    }


@pytest.mark.usefixtures("closed_network")
def test_resizing_averages_and_no_size_leaves_images_as_they_are(tmp_path: Path) -> None:
    prepare_by_tfds("tiny_stripes", tmp_path / "tensorflow_datasets")
    config = DataConfig(name="tiny_stripes", directory=str(tmp_path))
    images, labels = load(config).train.read()
    stripes = np.tile(np.array([240, 0], np.uint8), (16, 8))
    for image, label in zip(images[..., 0], labels, strict=True):
        np.testing.assert_array_equal(image, stripes if label == 0 else stripes.T)
    # Single pixels would be black or white; their average is grey.
    small = load(config.model_copy(update={"image_size": (5, 5)})).train.read()[0]
    assert small.shape[1:] == (5, 5, 1)
    assert abs(small.astype(float) - 120).max() < 30


def test_another_size_is_another_preparation(pictures: DataConfig) -> None:
    other = pictures.model_copy(update={"image_size": (2, 2)})
    assert load(pictures).spec.image_shape == (3, 5, 3)
    assert load(other).spec.image_shape == (2, 2, 3)
    assert load(pictures).spec.fingerprint != load(other).spec.fingerprint


@pytest.fixture(params=["ours", "theirs"])
def tfds_folder(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed_network: None,  # noqa: ARG001
) -> Path:
    """The folder where tensorflow-datasets wrote files: ours or its default."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "theirs"))
    ours = tmp_path / "ours" / "tensorflow_datasets"
    return ours if request.param == "ours" else tmp_path / "theirs"


@pytest.mark.parametrize("version", ["", ":1.2.3"])
def test_a_prepared_set_is_found_in_either_folder(
    version: str, tfds_folder: Path, tmp_path: Path
) -> None:
    prepare_by_tfds("tiny_pictures", tfds_folder)
    config = DataConfig(
        name=f"tiny_pictures{version}", directory=str(tmp_path / "ours"), image_size=(2, 2)
    )
    spec = load(config).spec
    assert (spec.name, spec.version, spec.train) == (f"tiny_pictures{version}", "1.2.3", 32)
    assert str(tfds_folder) in spec.origin


def test_a_prepared_set_needs_no_class_in_the_catalog(tfds_folder: Path, tmp_path: Path) -> None:
    tfds.disable_progress_bar()
    for variant in ("wide", "narrow"):
        TinyUninstalled(data_dir=str(tfds_folder), config=variant).download_and_prepare()
    before = {path: path.stat().st_mtime_ns for path in tfds_folder.rglob("*")}

    def opened(name: str) -> tuple[str, str, int]:
        spec = load(DataConfig(name=name, directory=str(tmp_path / "ours"))).spec
        return spec.version, Path(spec.origin.split(" files in ")[1]).parent.name, spec.train

    for name, variant in {
        "tiny_uninstalled": "wide",  # the first one is the default
        "tiny_uninstalled:1.2.3": "wide",
        "tiny_uninstalled/narrow": "narrow",
        "tiny_uninstalled/narrow:1.2.3": "narrow",
    }.items():
        assert opened(name) == ("1.2.3", variant, 16)
    # Nothing was written: the folder may be read-only.
    assert {path: path.stat().st_mtime_ns for path in tfds_folder.rglob("*")} == before
    for name in ("tiny_uninstalled:9.9.9", "tiny_uninstalled/tall", "tiny_uninstaled"):
        with pytest.raises(InputError, match="unknown data set"):
            opened(name)


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
    pictures: DataConfig, tmp_path: Path
) -> None:
    expected = load(pictures).spec
    folder, aside = tmp_path / "tiny_pictures-3x5", tmp_path / "aside"
    folder.rename(aside)
    written = (aside / "prepared.json").stat().st_mtime_ns
    with ThreadPoolExecutor(1) as thread, filelock.FileLock(tmp_path / ".lock"):
        loaded = thread.submit(load, pictures)
        time.sleep(0.5)
        assert not loaded.done()
        assert not folder.exists()
        aside.rename(folder)  # the other process has finished
    assert loaded.result().spec == expected
    assert (folder / "prepared.json").stat().st_mtime_ns == written


def test_what_a_killed_preparation_left_is_removed(pictures: DataConfig, tmp_path: Path) -> None:
    left = tmp_path / f"{PARTIAL}mnist-abc"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    # A file of the user, who uses this folder for tensorflow-datasets too.
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
    with pytest.raises(InputError, match="of 'mnist', received 'tiny_pictures'"):
        load(DataConfig(name="mnist", directory=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "received"),
    [
        ("tiny_sentences", "'image': Text"),
        ("tiny_unsupervised", "supervised: None"),
        ("imdb_reviews", "'text': Text"),
        ("tiny_floats", "Image.shape=.4, 4, 1., dtype=float32"),
        ("tiny_films", "Image.shape=.None, 4, 4, 3., dtype=uint8"),
    ],
)
@pytest.mark.usefixtures("closed_network")
def test_a_set_that_is_no_image_classification_is_refused(
    name: str, received: str, tmp_path: Path
) -> None:
    expected = f"'{name}': expected an image, uint8 .*, and a class label, received .*{received}"
    with pytest.raises(InputError, match=expected):
        load(DataConfig(name=name, directory=str(tmp_path), image_size=(4, 4)))


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
    with pytest.raises(InputError, match="unknown option 'split': available: none"):
        load(DataConfig(name="mnist", directory=str(tmp_path), options={"split": "x"}))


def mnist(directory: Path, **options: Any) -> DataConfig:
    return DataConfig(name="mnist", directory=str(directory), **options)


@pytest.mark.parametrize("network", ["closed_network", "mute_network"])
def test_without_a_network_mnist_is_a_sample_within_ten_seconds(
    network: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = load(DataConfig(name="mnist_sample")).spec
    request.getfixturevalue(network)
    monkeypatch.setattr(trainer.data.tfds, "_ANSWER_SECONDS", 0.5)  # no test waits 4 s
    started = time.monotonic()
    dataset = load(mnist(tmp_path))
    # Without a time-out the request waits for minutes.
    assert time.monotonic() - started < 10
    assert dataset.spec == sample
    (warning,) = [
        r for r in caplog.records if r.name.startswith("trainer") and r.levelname == "WARNING"
    ]
    assert "SAMPLE" in warning.getMessage()
    assert "TRAINER_DATA_FILES" in warning.getMessage()
    # Nothing is stored that would be used as MNIST the next time.
    assert not (tmp_path / "mnist").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "fashion_mnist"}, "data set 'fashion_mnist' is not available"),
        ({"name": "mnist", "allow_sample": False}, r"'mnist' .*\(data\.allow_sample = False\)"),
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


@pytest.fixture(params=["data.archives", "TRAINER_DATA_FILES"])
def give(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    closed_network: None,  # noqa: ARG001
) -> Callable[[Path], DataConfig]:
    """Sets the folder of archives in the configuration or the environment."""

    def configure(folder: Path) -> DataConfig:
        if request.param == "data.archives":
            return mnist(tmp_path / "data", archives=str(folder))
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
    assert f"Got: UrlInfo(size={len(ERROR_PAGE)} bytes" in message
    assert hashlib.sha256(ERROR_PAGE).hexdigest() in message
    sums = {  # the first digits
        "train-images-idx3-ubyte.gz": "440fcabf73cc546f",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbe",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6d",
    }
    assert f"checksum='{sums[named]}" in message.partition("Got: ")[0]
    assert not (tmp_path / "data" / "mnist").exists()


def test_folder_that_lacks_an_archive_is_refused(
    give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    (tmp_path / "archives").mkdir()
    for name in ARCHIVES[:-1]:
        (tmp_path / "archives" / name).write_bytes(ERROR_PAGE)
    config = give(tmp_path / "archives").model_copy(update={"allow_sample": False})
    with pytest.raises(
        InputError, match=rf"archives \(.*\) lacks {ARCHIVES[-1]}, and .* not answer"
    ):
        load(config)


def test_folder_that_does_not_exist_is_refused(
    give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"(data\.archives|TRAINER_DATA_FILES): .*no such folder"):
        load(give(tmp_path / "archives"))


def test_a_folder_without_archives_is_named(
    give: Callable[[Path], DataConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "archives"
    (folder / "mnist").mkdir(parents=True)
    (folder / "notes.txt").write_text("nothing here")
    reason = rf"{folder} \(.*\) lacks {', '.join(sorted(ARCHIVES))}, and .* does not answer"
    config = give(folder)
    if config.archives:  # the user wants these archives, not the sample
        with pytest.raises(InputError, match=reason):
            load(config)
    else:
        assert load(config).spec.name == "mnist_sample"
        assert re.search(f"Training on a SAMPLE.*{reason}", caplog.text)


def test_an_empty_folder_of_its_name_hides_no_archive(
    give: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    (tmp_path / "archives" / "mnist").mkdir(parents=True)
    for name in ARCHIVES:
        (tmp_path / "archives" / name).write_bytes(ERROR_PAGE)
    with pytest.raises(InputError, match="has wrong checksum"):
        load(give(tmp_path / "archives"))


def test_a_folder_that_cannot_be_written_is_refused(
    pictures: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    config = pictures.model_copy(update={"directory": str(tmp_path / "file")})
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tensorflow_datasets"))
    with pytest.raises(InputError, match=r"cannot be written .*data\.directory"):
        trainer.data.tfds.prepare(config)


@pytest.mark.usefixtures("no_archives", "closed_network")
def test_what_was_not_prepared_here_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"the only copy")
    config = DataConfig(name="mnist", directory=str(tmp_path / "data"))
    for act in (load, trainer.data.tfds.prepare):
        with pytest.raises(InputError, match="nothing was changed"):
            act(config)
    assert precious.read_bytes() == b"the only copy"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mnist"]
