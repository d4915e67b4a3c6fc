"""Images and labels: `load(config)` returns train, validation and test splits and a `DataSpec`.

To add a data set, add one module to this folder. Its file name is the value of `[data] name`. Its
function `load(config, **options)` returns a `Source`. There is no registry. A module whose name
starts with an underscore is not a data set.
"""

import hashlib
import importlib
import logging
import mmap
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.config import DataConfig, call_with_options
from trainer.errors import InputError, expect, explain_user_code
from trainer.preprocessing import Images as Images
from trainer.preprocessing import Preprocessing, border_brightness

_Size = Annotated[int, Field(ge=1, le=2**16)]
Labels = NDArray[np.int32]
Examples = tuple[Images, NDArray[Any]]

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_BORDER_IMAGES = 256  # training images whose edges are measured

# Zero-width joiner and non-joiner. They are not printable, but words and emoji contain them.
_JOINERS = str.maketrans("", "", "\u200c\u200d")


class DataSpec(BaseModel):
    """Facts about a data set. Models, metrics, exports and reports are built from them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  #: for example "mnist" or "mnist_sample"
    version: str
    image_shape: tuple[_Size, _Size, _Size]  #: height, width, channels
    class_names: tuple[str, ...]  #: in the order of the labels 0, 1, ...
    train: int  #: number of images
    validation: int
    test: int
    fingerprint: str  #: SHA-256 of all images and labels of the source, in order
    origin: str  #: where the data came from, as text
    preprocessing: Preprocessing | None = None  #: None if image files cannot be converted
    border: float | None = None  #: mean brightness of the edges of training images, 0 to 255

    @model_validator(mode="before")
    @classmethod
    def _old_specs_stretch(cls, value: Any) -> Any:
        # Earlier versions stored no preprocessing: they always stretched images.
        if isinstance(value, dict) and "preprocessing" not in value and "image_shape" in value:
            how = Preprocessing.of_data(value["image_shape"], DataConfig())
            return value | {"preprocessing": how}
        return value

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class Split:
    """Some rows of an array of images."""

    images: Images  #: uint8 [all, height, width, channels], in memory or mapped from a file
    labels: Labels  #: int32 [all]
    rows: NDArray[np.int64]  #: [n], the rows that belong to this split
    files: Sequence[str] | None = None  #: [all], the original image files, or None

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Size of the images in bytes."""
        return len(self) * int(np.prod(self.images.shape[1:]))

    def class_counts(self, classes: int) -> list[int]:
        """Returns the number of images of each class."""
        return cast("list[int]", np.bincount(self.labels[self.rows], minlength=classes).tolist())

    def sample(self, count: int, seed: int) -> "Split":
        """Returns a random sample, in proportion to the classes and with at least one of each.

        The images are in the order of this split. A split of at most `count` images is returned
        unchanged. With fewer images than classes, some classes have none.
        """
        if count >= len(self):
            return self
        order = np.random.RandomState(seed).permutation(len(self))
        labels = self.labels[self.rows[order]]
        # Image k of a class of n images has the rank k / n. So the first image of each class comes
        # first, and the others follow at equal distances.
        rank = np.empty(len(self))
        rank[np.argsort(labels, kind="stable")] = np.concatenate(
            [np.arange(size) / size for size in np.bincount(labels) if size]
        )
        first = np.argsort(rank, kind="stable")[:count]
        return replace(self, rows=self.rows[np.sort(order[first])])

    def read(self, positions: NDArray[np.int64] | slice = slice(None)) -> tuple[Images, Labels]:
        """Returns copies of the images and labels at some positions of the split.

        Rows of a memory map are read from its file. Reading them through the map would add the
        pages around them to the memory of this process (docs/performance.md, Growth).

        Args:
            positions: int64 [k] in [0, n), or a slice.
        """
        rows = self.rows[positions]
        images: Any = self.images
        # Not for a slice of a map or a writable map: the file at `offset` may differ from it.
        whole = isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap)
        whole = whole and hasattr(os, "preadv")  # not on Windows
        if not (whole and images.mode == "r" and images.flags.c_contiguous):
            return np.asarray(images[rows]), self.labels[rows]
        found = np.empty((len(rows), *images.shape[1:]), np.uint8)
        offsets = images.offset + rows * int(np.prod(images.shape[1:]))
        with Path(images.filename).open("rb", buffering=0) as file:
            # map() runs no Python code between the reads: that would take as long as the reads.
            count = sum(map(os.preadv, repeat(file.fileno()), zip(found), offsets.tolist()))
        expect(count == found.nbytes, images.filename, f"{found.nbytes} bytes of images", count)
        return found, self.labels[rows]


@dataclass(frozen=True)
class Dataset:
    """The three splits and the facts about them."""

    spec: DataSpec
    train: Split
    validation: Split
    test: Split

    def split(self, name: str) -> Split:
        """Returns a split by its name: "train", "validation" or "test"."""
        if name not in SPLITS:
            raise InputError(f"expected a split: train, validation or test; received {name!r}")
        return cast("Split", getattr(self, name))


@dataclass(frozen=True)
class Source:
    """The examples that a module of this folder returns, before anything is held out.

    If validation or test is None, or has only negative labels, it is held out of train.
    """

    name: str
    version: str  #: change it when the data changes
    class_names: Sequence[str]  #: in the order of the labels 0, 1, ...; each is one line of text
    train: Examples  #: images (uint8 [n, height, width, channels]) and labels (int [n])
    test: Examples | None = None
    validation: Examples | None = None
    origin: str = "a module of trainer/data"  #: where the data came from, as text
    fingerprint: str | None = None  #: as `fingerprint` returns it; computed if None
    preprocessing: Preprocessing | None = None  #: how its images were made; from the shape if None
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)  #: the image files by split
    skipped: Sequence[str] = ()  #: files that could not be read


def names() -> list[str]:
    """Returns the names of the data sets that are modules of this folder."""
    found = [m.name for m in pkgutil.iter_modules(__path__)]
    return sorted(n for n in found if not n.startswith("_") and n != "tfds")


def load(config: DataConfig) -> Dataset:
    """Loads the data set that a configuration names, and holds out validation images.

    Raises:
        InputError: The data set is unknown, damaged or not available.
    """
    where, function = f"data set {config.name!r}", find(config)
    try:
        source = call_with_options(function, config, options=config.arguments, where="data.options")
    except OSError as error:
        reason = explain_user_code(error) or error
        raise InputError(f"{where} cannot be read: {reason}") from error
    expect(isinstance(source, Source), where, "load() to return a Source", type(source).__name__)
    _check_class_names(source.class_names, where)
    checked: Any = {split: _checked(source, split) for split in SPLITS}
    dataset = _make_splits(_fitted(replace(source, **checked), config), config)
    counts = dataset.train.class_counts(dataset.spec.class_count)
    untrained = [name for name, count in zip(source.class_names, counts, strict=True) if not count]
    if untrained:
        message = f"{where}: {len(untrained)} of its classes are without training images"
        message += f": {', '.join(untrained[:5])}{', ...' if len(untrained) > 5 else ''}"
        if source.files:
            raise InputError(message)
        _log.warning("%s", message)
    return dataset


def _check_class_names(class_names: Sequence[str], where: str) -> None:
    """Refuses names that cannot be printed (a line break, half of a surrogate pair)."""
    listed = isinstance(class_names, Sequence) and not isinstance(class_names, str)
    expect(listed, where, "a list of class names", type(class_names).__name__)
    for name in class_names:
        text = name.translate(_JOINERS) if isinstance(name, str) else ""
        printable = text.strip() and text.isprintable()
        expect(printable, where, "class names of printable text", ascii(name)[:60])
    different = len(set(class_names))
    expected = f"{len(class_names)} class names"
    expect(different == len(class_names), where, expected, f"{different} different")


def fingerprint(examples: Sequence[Examples]) -> str:
    """Returns the SHA-256 of shape, images (as bytes) and labels (int32), split after split."""
    digest = hashlib.sha256()
    for images, labels in examples:
        digest.update(repr(images.shape).encode())
        digest.update(np.ascontiguousarray(images).data)
        digest.update(np.ascontiguousarray(labels, dtype="<i4").data)
    return digest.hexdigest()


def module_function(package: str, name: str, function: str) -> Callable[..., Any]:
    """Returns `load` or `build` of a module of trainer/data or trainer/models."""
    module = importlib.import_module(f"{package}.{name}")
    found = getattr(module, function, None)
    expect(callable(found), str(module.__file__), f"a function {function}()", found)
    return cast("Callable[..., Any]", found)


def find(config: DataConfig) -> Callable[..., Any]:
    """Returns the function that loads the data set of a configuration."""
    return module_function(__name__, config.name if config.name in names() else "tfds", "load")


def _make_splits(source: Source, config: DataConfig) -> Dataset:
    """Holds out the splits that the source does not have, by a seeded permutation of train."""
    # RandomState draws the same permutation in every version of numpy; default_rng may not.
    order = np.random.RandomState(config.split_seed).permutation(len(source.train[0]))
    train = Split(*source.train, order, source.files.get("train"))
    splits: dict[str, Split] = {}
    for name, fraction in (
        ("test", config.test_fraction),
        ("validation", config.validation_fraction),
    ):
        examples: Examples | None = getattr(source, name)
        if examples is None:
            count = max(1, round(fraction * len(source.train[0])))
            held_out, order = order[:count], order[count:]
            splits[name] = replace(train, rows=np.sort(held_out))
        else:
            rows = np.arange(len(examples[0]))
            splits[name] = Split(*examples, rows, source.files.get(name))
    expected = "training images that are left after validation and test images are held out"
    expect(len(order), f"data set {source.name!r}", expected, f"{len(source.train[0])} images")
    splits["train"] = replace(train, rows=np.sort(order))
    if config.train_on_validation:
        splits["train"] = _joined(splits["train"], splits["validation"])
    given = [s for s in (source.train, source.validation, source.test) if s is not None]
    spec = DataSpec(
        name=source.name,
        version=source.version,
        image_shape=source.train[0].shape[1:],
        class_names=tuple(source.class_names),
        **{name: len(split) for name, split in splits.items()},
        fingerprint=source.fingerprint or fingerprint(given),
        origin=source.origin,
        preprocessing=source.preprocessing,
        border=border_brightness(splits["train"].sample(_BORDER_IMAGES, 0).read()[0]),
    )
    return Dataset(spec=spec, **splits)


def _joined(one: Split, other: Split) -> Split:
    """Returns the images of both splits. Images of different arrays are copied into memory."""
    if one.images is other.images:
        return replace(one, rows=np.sort(np.concatenate([one.rows, other.rows])))
    (images, labels), (more_images, more_labels) = one.read(), other.read()
    labels = np.concatenate([labels, more_labels])
    return Split(np.concatenate([images, more_images]), labels, np.arange(len(labels)))


def _fitted(source: Source, config: DataConfig) -> Source:
    """Returns a source with its preprocessing, and with images of its size and color."""
    shape = source.train[0].shape[1:]
    how = source.preprocessing or Preprocessing.of_data(shape, config)
    if how is None:
        changed = config.image_size is not None or config.color != "auto"
        expect(not changed, f"data set {source.name!r}", "1, 3 or 4 channels to convert", shape[2])
    elif how.shape != shape:
        from trainer.images import fit_array

        given = {name: getattr(source, name) for name in SPLITS if getattr(source, name)}
        fitted: Any = {
            name: (np.stack([fit_array(image, how) for image in images]), labels)
            for name, (images, labels) in given.items()
        }
        return replace(source, preprocessing=how, fingerprint=None, **fitted)
    return replace(source, preprocessing=how)


def _checked(source: Source, split: str) -> Examples | None:
    """Returns the examples of a split if they fit; None if it has none or only negative labels."""
    if getattr(source, split) is None:
        return None
    where, classes = f"data set {source.name!r}, {split}", len(source.class_names)
    for given in (source.train, getattr(source, split)):
        pair = isinstance(given, Sequence) and len(given) == 2
        expect(pair, where, "a pair of images and labels", type(given).__name__)
    images, labels = map(np.asanyarray, getattr(source, split))
    fits = (
        (images.dtype == np.uint8 and images.ndim == 4 and images.size > 0)
        and images.shape[1:] == np.shape(source.train[0])[1:]
        and (np.issubdtype(labels.dtype, np.integer) and labels.shape == images.shape[:1])
    )
    expected = "uint8 images [n, height, width, channels], of one size, and n integer labels"
    received = (f"{array.dtype} {list(array.shape)}" for array in (images, labels))
    expect(fits, where, expected, " and ".join(received))
    lowest, highest = labels.min(), labels.max()
    if highest < 0 and split != "train":
        message = "The %s split of %s has no labels: %s images are held out of train instead."
        _log.warning(message, split, source.name, split)
        return None
    fits = 0 <= lowest <= highest < classes
    expect(fits, where, f"labels from 0 to {classes - 1}", f"{lowest} to {highest}")
    return images, labels.astype(np.int32, copy=False)
