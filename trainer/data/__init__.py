"""Images and labels: `load(config)` gives train, validation and test apart, and a `DataSpec`.

A data set of your own is one module in this folder. Its file name is the name that `[data] name`
takes; its function `load(config, **options)` returns a `Source`. Nothing is registered anywhere.
Modules whose name begins with an underscore are no data sets.
"""

import hashlib
import importlib
import logging
import mmap
import os
import pkgutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from trainer.config import DataConfig, call_with_options
from trainer.errors import InputError, explain_user_code

_Size = Annotated[int, Field(ge=1, le=2**16)]
Images = NDArray[np.uint8]
Labels = NDArray[np.int32]
Examples = tuple[Images, Labels]

_log = logging.getLogger(__name__)

# The most classes that a message names, and the most characters of a name.
_SHOWN_CLASSES = 12
_SHOWN_CHARACTERS = 40

# Unicode categories of control and format characters, surrogates, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# The format characters that words and emoji need: zero-width non-joiner and joiner.
_JOINERS = "\u200c\u200d"

# Read at once, so that what is read need not be in memory twice.
_PIECE_BYTES = 2**24


class DataSpec(BaseModel):
    """The facts of a data set that models, metrics, exports and reports are built from.

    Attributes:
        name: Of the data set, for example "mnist" or "mnist_sample".
        version: Of the data set.
        image_shape: Height, width and channels.
        class_names: In the order of the labels 0, 1, ...
        train: Number of images trained on.
        validation: Number of images held out to watch the training.
        test: Number of images scored once, at the end.
        fingerprint: SHA-256 over every image and label of the source, in its order.
        origin: Where the data came from, in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    image_shape: tuple[_Size, _Size, _Size]
    class_names: tuple[str, ...]
    train: int
    validation: int
    test: int
    fingerprint: str
    origin: str

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Split:
    """Some rows of an array of images.

    Attributes:
        images: uint8 [all, height, width, channels], in memory or mapped from a file.
        labels: int32 [all].
        rows: int64 [n], the rows that belong to this split.
    """

    images: Images
    labels: Labels
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the images take in memory."""
        return len(self) * int(np.prod(self.images.shape[1:]))

    def class_counts(self, classes: int) -> list[int]:
        """Returns the number of images of each of `classes` classes."""
        return [int(count) for count in np.bincount(self.labels[self.rows], minlength=classes)]

    def sample(self, count: int, seed: int) -> "Split":
        """Draws images at random, in proportion to their classes and at least one of each.

        Args:
            count: Number of images. Fewer than there are classes leave classes out.
            seed: The same seed draws the same images.

        Returns:
            The images in the order of this split; the split itself if it has no more than `count`.
        """
        if count >= len(self):
            return self
        order = np.random.RandomState(seed).permutation(len(self))
        labels = self.labels[self.rows[order]]
        # The k-th image of a class of n images comes at k / n: the first of every class, then the
        # others at even distances.
        sizes = np.bincount(labels)
        starts = np.cumsum(sizes) - sizes
        by_class = np.argsort(labels, kind="stable")
        rank = np.empty(len(self), np.int64)
        rank[by_class] = np.arange(len(self)) - starts[labels[by_class]]
        first = np.argsort(rank / sizes[labels], kind="stable")[:count]
        return Split(self.images, self.labels, self.rows[np.sort(order[first])])

    def read(self, positions: NDArray[np.int64] | slice = slice(None)) -> Examples:
        """Returns images and labels at some positions of the split, copied into memory.

        Args:
            positions: int64 [k] in [0, n), or a slice of them.
        """
        rows = self.rows[positions]
        images = self.images
        # A view of a map knows the map's place in the file, not its own, and one that may be
        # written to holds what the file does not: those are read as they are.
        if (
            isinstance(images, np.memmap)
            and isinstance(images.base, mmap.mmap)
            and images.mode == "r"
            and images.flags.c_contiguous
        ):
            return _read_rows(images, rows), self.labels[rows]
        return np.asarray(images[rows]), self.labels[rows]


def _read_rows(images: "np.memmap[Any, Any]", rows: NDArray[np.int64]) -> Images:
    """Reads rows from the file of a map, and not through the map.

    What is read through a map is counted as memory of this process, and more than was asked for:
    the kernel maps the neighbourhood of each page touched. (docs/performance.md, Growth.)

    Raises:
        InputError: The file has become shorter.
    """
    size = int(np.prod(images.shape[1:]))
    found = np.empty((len(rows), size), np.uint8)
    step = max(1, _PIECE_BYTES // size)
    with Path(str(images.filename)).open("rb", buffering=0) as file:
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            starts = np.flatnonzero(np.diff(piece, prepend=-2) != 1)  # rows in succession: one read
            counts = np.diff(starts, append=len(piece)) * size
            places = images.offset + piece[starts] * size
            # map() calls pread without Python between the calls, which would take as long as they.
            parts = map(os.pread, repeat(file.fileno()), counts.tolist(), places.tolist())
            content = b"".join(parts)
            if len(content) != len(piece) * size:
                raise InputError(
                    f"{images.filename}: expected {len(piece) * size} bytes of {len(piece)} "
                    f"images, read {len(content)}"
                )
            found[first : first + step] = np.frombuffer(content, np.uint8).reshape(-1, size)
    return found.reshape(len(rows), *images.shape[1:])


@dataclass(frozen=True)
class Dataset:
    """The three splits, apart, and what is known about them."""

    spec: DataSpec
    train: Split
    validation: Split
    test: Split

    def split(self, name: str) -> Split:
        """Returns a split by its name: "train", "validation" or "test".

        Raises:
            InputError: It is none of these.
        """
        if name not in ("train", "validation", "test"):
            raise InputError(f"expected a split: train, validation or test; received {name!r}")
        split: Split = getattr(self, name)
        return split


@dataclass(frozen=True)
class Source:
    """What a module of this folder gives: the examples as they came, not yet held out.

    Attributes:
        name: Of the data set.
        version: Of the data set; change it when the data changes.
        class_names: In the order of the labels 0, 1, ...; text of one line.
        train: Images (uint8 [n, height, width, channels]) and labels (int [n]).
        test: The same; None, or only negative labels: test images are held out of train.
        validation: The same; None, or only negative labels: they are held out of train.
        origin: Where the data came from, in words.
        fingerprint: Where it is already known; else it is computed.
    """

    name: str
    version: str
    class_names: Sequence[str]
    train: tuple[Images, NDArray[Any]]
    test: tuple[Images, NDArray[Any]] | None = None
    validation: tuple[Images, NDArray[Any]] | None = None
    origin: str = "a module of trainer/data"
    fingerprint: str | None = None


def names() -> list[str]:
    """Returns the data sets that are modules of this folder."""
    found = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted(n for n in found if not n.startswith("_") and n != "tfds")


def load(config: DataConfig) -> Dataset:
    """Loads the data set that a configuration names, and holds validation images out of train.

    Args:
        config: Its `name` is a module of this folder, or else a set of tensorflow-datasets.

    Returns:
        The splits and their description.

    Raises:
        InputError: The set is unknown, damaged, or not to be had here.
    """
    if config.name in names() and config.image_size is not None:
        raise InputError(
            f"data.image_size is for sets of tensorflow-datasets; {config.name!r} is a module of "
            "trainer/data: its images are as large as its options say"
        )
    function = _find(config)
    try:
        source = call_with_options(function, config, options=config.arguments, where="data.options")
    except (OSError, MemoryError) as error:
        reason = explain_user_code(error) or str(error)
        raise InputError(f"data set {config.name!r} cannot be read: {reason}") from error
    if not isinstance(source, Source):
        raise InputError(
            f"data set {config.name!r}: expected load() to return a Source, "
            f"received {type(source).__name__}"
        )
    check_class_names(source.name, source.class_names)
    source = _without_unlabelled(source)
    for split in ("train", "validation", "test"):
        _check(source, split, getattr(source, split))
    dataset = _make_splits(source, config)
    _warn_of_untrained_classes(dataset)
    return dataset


def check_class_names(data_set: str, class_names: Sequence[str]) -> None:
    """Refuses class names that cannot be printed, drawn or told apart.

    Args:
        data_set: Name of the data set, for the message.
        class_names: In the order of the labels.

    Raises:
        InputError: A name is not text, has no visible character, has one that cannot be printed
            (a line break, half of a surrogate pair), or equals another one when both are printed.
    """
    labels: dict[str, int] = {}
    for label, name in enumerate(class_names):
        if not isinstance(name, str):
            raise InputError(
                f"data set {data_set!r}, class {label}: expected a name of type str, "
                f"received {type(name).__name__}"
            )
        where = f"data set {data_set!r}, class {label}: expected a name that can be printed"
        categories = {c: unicodedata.category(c) for c in name if c not in _JOINERS}
        unprintable = [c for c, category in categories.items() if category in _UNPRINTABLE]
        if unprintable:
            raise InputError(
                f"{where}, received {name[:_SHOWN_CHARACTERS]!a} with the character "
                f"U+{ord(unprintable[0]):04X}"
            )
        if not any(category[0] in "LNPS" for category in categories.values()):
            raise InputError(f"{where}, received {name[:_SHOWN_CHARACTERS]!a}")
        printed = " ".join(unicodedata.normalize("NFC", name).split())
        if printed in labels:
            raise InputError(
                f"data set {data_set!r}: expected classes of different names, received "
                f"{name[:_SHOWN_CHARACTERS]!a} for the classes {labels[printed]} and {label}"
            )
        labels[printed] = label


def warn_of_unlabelled(name: str, split: str) -> None:
    """Warns that a split has no labels and is not used."""
    _log.warning(
        "The %s split of %s has no labels and cannot be scored: %s images are held out of train.",
        *(split, name, split),
    )


def resolve(config: DataConfig) -> DataConfig:
    """Returns a configuration that records the default options of its data set, too.

    Raises:
        InputError: The module has no function `load`.
    """
    return config.resolved(_find(config))


def prepare(config: DataConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Decodes a data set and stores the arrays, unless that is done already.

    Args:
        config: Contains the name of the data set.
        overwrite: Decode it again. The old arrays are removed once the new ones are complete.

    Returns:
        The `DataSpec` as a dictionary.

    Raises:
        InputError: The data set is not available.
    """
    from trainer.data import tfds

    if config.name not in names() and not tfds.prepare(config, overwrite=overwrite):
        raise InputError(
            f"data set {config.name!r} could not be prepared: no archives were found and the "
            "network does not answer (`fit` would train on the sample)"
        )
    return load(config).spec.model_dump(mode="json")


def describe(config: DataConfig) -> dict[str, Any]:
    """Loads a data set and verifies the checksums of all its files.

    Returns:
        The `DataSpec` as a dictionary, with the number of images of each class in each split.

    Raises:
        InputError: The data set is not available, or a file has changed since it was prepared.
    """
    from trainer.data import tfds

    data = load(config)
    tfds.check(config)
    classes = data.spec.class_names
    counts = {
        name: dict(zip(classes, data.split(name).class_counts(len(classes)), strict=True))
        for name in ("train", "validation", "test")
    }
    return data.spec.model_dump(mode="json") | {"class_counts": counts}


def _find(config: DataConfig) -> Callable[..., Any]:
    """Returns the function that loads the data set which a configuration names."""
    name = config.name if config.name in names() else "tfds"
    module = importlib.import_module(f"{__name__}.{name}")
    function = getattr(module, "load", None)
    if not callable(function):
        raise InputError(f"{module.__file__}: expected a function load(config, **options)")
    return cast("Callable[..., Any]", function)


def fingerprint(examples: Sequence[tuple[Images, NDArray[Any]]]) -> str:
    """Returns the SHA-256 of shape, images (as bytes) and labels (int32), split after split."""
    digest = hashlib.sha256()
    for images, labels in examples:
        digest.update(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(labels, dtype="<i4").data)
    return digest.hexdigest()


def _without_unlabelled(source: Source) -> Source:
    """Leaves out a split whose labels are all negative, which means unknown."""
    left_out: dict[str, Any] = {}
    for split in ("validation", "test"):
        examples = getattr(source, split)
        labels = np.asarray([] if examples is None else examples[1])
        if labels.size and np.issubdtype(labels.dtype, np.integer) and (labels < 0).all():
            warn_of_unlabelled(source.name, split)
            left_out[split] = None
    return replace(source, **left_out)


def _warn_of_untrained_classes(dataset: Dataset) -> None:
    names = dataset.spec.class_names
    counts = dataset.train.class_counts(len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    if missing:
        shown = ", ".join(map(repr, missing[:_SHOWN_CLASSES]))
        _log.warning(
            "%d of %d classes of %s have no training images and cannot be learned: %s%s",
            *(len(missing), len(names), dataset.spec.name, shown),
            ", …" if len(missing) > _SHOWN_CLASSES else "",
        )


def _make_splits(source: Source, config: DataConfig) -> Dataset:
    """Holds out what the source has not apart already, by a permutation drawn from the seed."""
    # RandomState's stream is frozen for good, unlike default_rng's: the same seed holds out the
    # same images under every version of numpy.
    order = np.random.RandomState(config.split_seed).permutation(len(source.train[0]))
    splits: dict[str, Split] = {}
    for name, given, fraction in (
        ("test", source.test, config.test_fraction),
        ("validation", source.validation, config.validation_fraction),
    ):
        if given is None:
            count = max(1, round(fraction * len(source.train[0])))
            held_out, order = order[:count], order[count:]
            splits[name] = _split(source.train, np.sort(held_out))
        else:
            splits[name] = _split(given, np.arange(len(given[0])))
    if not len(order):
        raise InputError(
            f"data set {source.name!r}: none of its {len(source.train[0])} training images is left "
            "when validation and test are held out"
        )
    splits["train"] = _split(source.train, np.sort(order))
    if config.train_on_validation:
        splits["train"] = _joined(splits["train"], splits["validation"])
    given_splits = [s for s in (source.train, source.validation, source.test) if s is not None]
    spec = DataSpec(
        name=source.name,
        version=source.version,
        image_shape=source.train[0].shape[1:],
        class_names=tuple(source.class_names),
        **{name: len(split) for name, split in splits.items()},
        fingerprint=source.fingerprint or fingerprint(given_splits),
        origin=source.origin,
    )
    return Dataset(spec=spec, **splits)


def _joined(one: Split, other: Split) -> Split:
    """Returns both; in memory where they are not of the same array."""
    if one.images is other.images:
        return Split(one.images, one.labels, np.sort(np.concatenate([one.rows, other.rows])))
    (images, labels), (more, theirs) = one.read(), other.read()
    labels = np.concatenate([labels, theirs])
    return Split(np.concatenate([images, more]), labels, np.arange(len(labels)))


def _split(examples: tuple[Images, NDArray[Any]], rows: NDArray[np.int64]) -> Split:
    return Split(examples[0], np.asarray(examples[1], dtype=np.int32), rows)


def _check(source: Source, split: str, examples: tuple[Images, NDArray[Any]] | None) -> None:
    """Refuses arrays that a network could be trained on only by mistake."""
    if examples is None:
        return
    images, labels = examples
    where = f"data set {source.name!r}, {split}"
    for array in (images, labels):
        if not isinstance(array, np.ndarray):
            raise InputError(f"{where}: expected numpy arrays, received {type(array).__name__}")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"{where}: expected images as uint8 [n, height, width, channels], "
            f"received {images.dtype} {list(images.shape)}"
        )
    if images.size == 0 or labels.shape != (len(images),):
        raise InputError(
            f"{where}: expected as many labels as images and at least one, "
            f"received {len(images)} images and labels of shape {list(labels.shape)}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{where}: expected integer labels, received {labels.dtype}")
    if labels.min() < 0 or labels.max() >= len(source.class_names):
        raise InputError(
            f"{where}: expected labels from 0 to {len(source.class_names) - 1}, "
            f"received {labels.min()} to {labels.max()}"
        )
    if images.shape[1:] != source.train[0].shape[1:]:
        raise InputError(
            f"{where}: expected images of shape {list(source.train[0].shape[1:])} as in train, "
            f"received {list(images.shape[1:])}"
        )
