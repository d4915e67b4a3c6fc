"""The verbs `trainer data`: prepares a data set, and describes it."""

import hashlib
import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainer.config import DataConfig
from trainer.data import SPLITS, Dataset, load, names, tfds
from trainer.environment import usable_cpus
from trainer.images import read_header

_log = logging.getLogger(__name__)

_BATCH = 1024  # images that are read together
_LISTED = 10  # sizes and duplicates in the result
# A class is rare if it has less than this fraction of the images of the largest class.
_RARE = 0.1


def prepare(config: DataConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Decodes a data set, stores the arrays, and returns the `DataSpec` as a dictionary.

    With `overwrite`, stored arrays are removed once the new ones are complete.
    """
    if config.name not in names():
        tfds.prepare(config, overwrite=overwrite)
    return load(config).spec.model_dump(mode="json")


def describe(config: DataConfig) -> dict[str, Any]:
    """Loads a data set, verifies the checksums of all its files, and looks at every image.

    Returns:
        The `DataSpec` as a dictionary; "class_counts" by split and class; "image_sizes" of the
        original files, the most frequent first; "duplicates": the number of images that are equal
        to an earlier one after preprocessing, and "duplicate_files": pairs of such files.
    """
    # `load` verifies checksums only of data sets up to this size.
    data = load(config.model_copy(update={"device_limit_mb": sys.maxsize}))
    classes = data.spec.class_names
    counts = {
        name: dict(zip(classes, data.split(name).class_counts(len(classes)), strict=True))
        for name in SPLITS
    }
    _warn_about_rare_classes(counts["train"])
    duplicates, pairs = _duplicates(data)
    if duplicates:
        _log.warning("%d images are equal to an earlier image of the data set.", duplicates)
    return data.spec.model_dump(mode="json") | {
        "class_counts": counts,
        "image_sizes": _sizes(data),
        "duplicates": duplicates,
        "duplicate_files": pairs,
    }


def _warn_about_rare_classes(counts: dict[str, int]) -> None:
    largest = max(counts.values())
    rare = [f"{name} ({count})" for name, count in counts.items() if count < _RARE * largest]
    if rare:
        _log.warning(
            "Rare classes, with less than a tenth of the training images of the largest class "
            '(%d): %s. training.class_weight = "balanced" gives them more weight.',
            *(largest, ", ".join(rare[:_LISTED])),
        )


def _sizes(data: Dataset) -> dict[str, int]:
    """Returns the number of original files of each size, as "height x width"."""
    files = dict.fromkeys(file for name in SPLITS for file in data.split(name).files or ())
    with ThreadPoolExecutor(usable_cpus()) as pool:
        headers = pool.map(read_header, map(Path, files))
        sizes = Counter(f"{height} x {width}" for height, width, _ in headers)
    return dict(sizes.most_common(_LISTED))


def _duplicates(data: Dataset) -> tuple[int, list[list[str]]]:
    """Returns the number of repeated images, and the first pairs of their files."""
    first: dict[bytes, str] = {}
    count, pairs = 0, list[list[str]]()
    for name in SPLITS:
        split = data.split(name)
        for start in range(0, len(split), _BATCH):
            images, _ = split.read(slice(start, start + _BATCH))
            for row, image in zip(split.rows[start : start + _BATCH], images, strict=True):
                file = split.files[row] if split.files else f"{name}[{row}]"
                other = first.setdefault(hashlib.sha256(image).digest(), file)
                if other != file:
                    count += 1
                    pairs += [[other, file]] if len(pairs) < _LISTED else []
    return count, pairs
