"""The contract of all data sets, their sources, and the errors."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_contract import SPLITS, check_contract, check_disjoint
from samples import data_options, load_sample

import trainer
import trainer.data
import trainer.data.tfds
from trainer.config import DataConfig
from trainer.data import Dataset, Split, fingerprint, load, names
from trainer.data._prepared import open_prepared
from trainer.errors import InputError

# ---------------------------------------------------------------- the contract of all data sets


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], tuple[Dataset, Dataset]]:
    """Loads a data set twice, and only once for all tests."""
    known: dict[str, tuple[Dataset, Dataset]] = {}

    def get(name: str) -> tuple[Dataset, Dataset]:
        if name not in known:
            known[name] = (load_sample(name), load_sample(name))
        return known[name]

    return get


Loaded = Callable[[str], tuple[Dataset, Dataset]]


@pytest.mark.parametrize("name", names())
def test_every_module_fulfils_the_contract(name: str, loaded: Loaded) -> None:
    check_contract(*loaded(name))


@pytest.mark.parametrize("name", names())
def test_every_module_refuses_an_option_it_does_not_know(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.options.*: unknown option 'no_such': \S"):
        load(DataConfig(name=name, options=data_options(name) | {"no_such": 1}))


def test_tfds_is_no_data_set_of_its_own() -> None:
    assert {"mnist_sample", "synthetic"} <= set(names())
    assert "tfds" not in names()
    assert not any(name.startswith("_") for name in names())


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Adds a data set named `own`: 20 images of 4 x 3, changed by one line."""

    def write(line: str) -> None:
        (tmp_path / "own.py").write_text(
            "import numpy as np\n"
            "from trainer.data import Source\n"
            "def load(config, *, factor: int = 1):\n"
            "    images = np.arange(240, dtype=np.uint8).reshape(20, 4, 3, 1) // factor\n"
            "    labels, test, validation = np.arange(20) % 2, None, None\n"
            "    names = ['even', 'odd']\n"
            f"    {line}\n"
            "    train = images, labels\n"
            "    return Source('own', '1', names, train, test, validation)\n"
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
    "line_and_message",
    [
        ("images = images / 255", "train: expected uint8 images", "received float64 [20, 4, 3, 1]"),
        ("images = images[..., 0]", "uint8 images", "received uint8 [20, 4, 3] and int64 [20]"),
        ("labels = labels[:-1]", "n integer labels", "received uint8 [20, 4, 3, 1] and int64 [19]"),
        ("labels = np.eye(2, dtype=int)[labels]", "n integer labels", "and int64 [20, 2]"),
        ("labels = labels / 1", "n integer labels", "and float64 [20]"),
        ("labels = labels + 1", "expected labels from 0 to 1", "received 1 to 2"),
        ("labels = labels - 1", "expected labels from 0 to 1", "received -1 to 0"),
        ("labels = labels * 0 - 1", "train: expected labels from 0 to 1", "received -1 to -1"),
        ("test = images[:5], labels[:5] - 1", "test: expected labels from", "received -1 to 0"),
        ("images, labels = images[:0], labels[:0]", "train: expected", "received uint8 [0, 4, 3"),
        ("test = images[:5], labels[:4]", "data set 'own', test: expected", "and int64 [4]"),
        ("test = images[:5, :2], labels[:5]", "test: expected", "of one size", "[5, 2, 3, 1]"),
        ("validation = images[:5], labels[:5] + 7", "'own', validation: expected labels"),
        ("images, labels = images[:2], labels[:2]", "images that are left", "received 2 images"),
    ],
    ids=lambda value: value[0],
)
def test_arrays_that_a_network_could_learn_only_by_mistake_are_refused(
    line_and_message: tuple[str, ...], own_module: Callable[[str], None]
) -> None:
    line, *parts = line_and_message
    own_module(line)
    with pytest.raises(InputError) as refused:
        load(DataConfig(name="own"))
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("names", "received"),
    [
        (["a", "b\ud800"], r"'b\ud800'"),
        (["a\nb", "b"], r"'a\nb'"),
        (["a", "\x1b[31mred"], r"'\x1b[31mred'"),
        (["\ufeffa", "b"], r"'\ufeffa'"),
        (["a", "\u202eb"], r"'\u202eb'"),
        (["a", ""], "''"),
        (["\u200d ", "b"], r"'\u200d '"),
        ([0, 1], "0"),
        (["a", None], "None"),
        (["a", "a"], "expected 2 class names, received 1 different"),
    ],
)
def test_class_names_that_cannot_be_shown_are_refused(
    names: list[Any], received: str, own_module: Callable[[str], None]
) -> None:
    own_module(f"names = {names!a}")
    with pytest.raises(InputError, match=r"data set 'own': expected .*class names") as refused:
        load(DataConfig(name="own"))
    assert str(refused.value).endswith(received)
    assert str(refused.value).isprintable()


def test_other_class_names_are_taken_as_they_are(own_module: Callable[[str], None]) -> None:
    names = ["a|b", "$x^$", "[red]", "<b>", "a, b", "Cat", "cat", "猫", "👩\u200d🚀", "é", "`"]
    names += ["\\", "²", "2", " a", "#", "x" * 9999, "\u0646\u06cc\u0645\u200c\u0641"]
    own_module(f"names = {names!a}")
    assert load(DataConfig(name="own")).spec.class_names == tuple(names)


def test_a_split_without_labels_is_not_used(
    own_module: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    own_module("test, validation = (images[:5], labels[:5] * 0 - 1), (images[5:9], labels[5:9])")
    dataset = load(DataConfig(name="own", test_fraction=0.25))
    assert [len(dataset.split(name)) for name in SPLITS] == [15, 4, 5]
    assert dataset.test.images is dataset.train.images
    assert set(dataset.test.read()[1]) == {0, 1}
    assert caplog.messages == [
        "The test split of own has no labels: test images are held out of train instead."
    ]


def test_a_class_without_training_images_is_named(
    own_module: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    own_module("labels = labels * 0")
    dataset = load(DataConfig(name="own"))
    assert caplog.messages == ["data set 'own': 1 of its classes are without training images: odd"]
    assert dataset.train.class_counts(2) == [len(dataset.train), 0]


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_has_every_class_in_proportion(seed: int) -> None:
    sizes = [4, 60, 300, 36]  # 400, sorted by class; the rows before them are of another split
    labels = np.repeat(np.arange(4, dtype=np.int32), sizes)
    split = Split(np.zeros((500, 1, 1, 1), np.uint8), np.pad(labels, (100, 0)), np.arange(100, 500))
    for count in (4, 40, 100, 399):
        sample = split.sample(count, seed)
        assert len(sample) == len(set(sample.rows)) == count
        assert set(sample.rows) <= set(split.rows)
        assert (np.diff(sample.rows) > 0).all()  # in the order of the split
        expected = np.array(sizes) * count / 400
        found = np.array(sample.class_counts(4))
        assert found.min() >= 1
        assert (abs(found - expected) <= 3).all()
        assert sample.rows.tolist() == split.sample(count, seed).rows.tolist()
    assert split.sample(100, seed).rows.tolist() != split.sample(100, seed + 1).rows.tolist()
    assert split.sample(400, seed) is split.sample(999, seed) is split


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
    # The type of the labels and the memory layout do not matter.
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
    # The split does not change the fingerprint.
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

    # A seed selects these rows of 40 with every version of numpy.
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
    # White ink with all values of a byte; most of the image is black.
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


@pytest.mark.slow
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
    open_prepared(prepared_mnist / "mnist", checked_bytes=10**9)


# ---------------------------------------------------------------- reading a split


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
    with pytest.raises(InputError, match=r"images.npy: expected 12 bytes of images, received 6"):
        split.read(np.array([9, 12]))


# ---------------------------------------------------------------- scoring


def test_limited_batches_score_a_fixed_sample_of_all_classes(
    own_module: Callable[[str], None], tmp_path: Path
) -> None:
    # Every split is sorted by class, and the last pixel shows the class.
    own_module(
        "labels = np.repeat(np.arange(2), 200); images = np.zeros((400, 4, 3, 1), np.uint8); "
        "images[:, -1, -1] = labels[:, None] * 200; test = validation = images, labels"
    )
    options = {
        "data.name": "own",
        "model.name": "mlp",
        "training.epochs": 1,
        "training.batch_size": 16,
        "training.limit_batches": 2,
        "logging.directory": str(tmp_path / "runs"),
        "logging.name": "limited",
    }
    fitted = trainer.fit(trainer.Config().with_changes(options))
    assert fitted.run is not None
    assert fitted.summary["test_images"] == 32
    classes = json.loads((fitted.run.path / "classes.json").read_text())
    assert [row["support"] for row in classes.values()] == [16, 16]
    # Labels and predictions have the same order: the mean recall equals the accuracy.
    accuracy = fitted.summary["test"]["accuracy"]
    assert np.mean([row["recall"] for row in classes.values()]) == pytest.approx(accuracy)
    for split in ("test", "validation"):
        scores = trainer.evaluate(str(fitted.run.path), split=split)
        assert scores["images"] == 32
        assert scores["loss"] == pytest.approx(fitted.summary[split]["loss"], abs=1e-6)
