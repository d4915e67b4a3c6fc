"""Image files as a data set: decoded once, in parallel, and stored as arrays.

The stored arrays belong to the state of the files (names, sizes, times) and to the preprocessing.
If any of them changes, the files are decoded again.
"""

import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from trainer.config import DataConfig
from trainer.data import Examples, Source
from trainer.data._prepared import open_prepared, preparing, stored_version, write_prepared
from trainer.environment import usable_cpus
from trainer.errors import InputError, expect
from trainer.images import EXTENSIONS, Images, Preprocessing, read_header, read_image

Unreadable = Literal["refuse", "skip"]

# The splits by the names that users give them, as subfolders or in a table.
SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}

_log = logging.getLogger(__name__)

_BATCH = 256  # images that are decoded together; this limits the memory
_LISTED = 10  # files in a message


class LabeledFile(NamedTuple):
    """An image file and the label of its class."""

    path: Path
    label: int


Files = dict[str, list[LabeledFile]]  # by split


def list_images(folder: Path, others: Counter[str]) -> list[Path]:
    """Returns the image files in a folder and its subfolders, sorted.

    Hidden files and folders are skipped. A folder with several links to it is read once.

    Args:
        folder: The folder.
        others: Counts the files that are not images, by file name extension.

    Raises:
        InputError: A link leads to a folder above it, which has images of other classes.
    """
    found, seen, top = list[Path](), set[str](), Path(os.path.realpath(folder))
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        above = top != Path(real) and top.is_relative_to(real)
        expect(not above, parent, "no link to a folder above it", f"one to {real}")
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            path = Path(parent, name)
            if not path.is_file() and path.exists():  # reading a pipe would wait for ever
                others["special file"] += 1
            elif suffix in EXTENSIONS and not name.startswith("."):
                found.append(path)
            elif not name.startswith("."):
                others[suffix or "no extension"] += 1
    return found


def check_classes(where: str, class_names: Sequence[str], files: Files) -> None:
    """Checks the classes of a data set of files.

    Raises:
        InputError: There are fewer than two classes, two names differ only in case or Unicode form,
            or a class has fewer than two training images.
    """
    expect(len(class_names) > 1, where, "at least two classes", ", ".join(class_names) or "none")
    names: dict[str, str] = {}
    for name in class_names:
        other = names.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        expect(other == name, where, "class names that differ", f"{other!r} and {name!r}")
    counts = Counter(file.label for file in files["train"])
    few = [name for label, name in enumerate(class_names) if counts[label] < 2]
    expect(
        not few, where, "at least two training images of each class", f"fewer of {few[:_LISTED]}"
    )


def load_files(
    config: DataConfig,
    root: Path,
    class_names: Sequence[str],
    files: Files,
    *,
    unreadable: Unreadable = "refuse",
) -> Source:
    """Returns the data set of image files; decodes them if that has not been done before.

    Args:
        config: `directory`, `image_size`, `resize`, `color` and `background`.
        root: The folder or file that the files belong to; its name is the name of the data set.
        class_names: In the order of the labels.
        files: The files of each split, at least those of "train".
        unreadable: What to do with files that cannot be read.

    Raises:
        InputError: Files cannot be read, or differ in size without `data.image_size`.
    """
    check_classes(str(root), class_names, files)
    settings = config.model_dump(include={"image_size", "resize", "color", "background"})
    key = json.dumps([str(root.resolve()), settings, unreadable])
    folder = Path(config.directory) / f"{root.stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    version = _version(root, class_names, files)
    facts = {"name": root.stem, "version": version, "class_names": list(class_names)}
    prepare = partial(_prepare, config, folder, facts | {"origin": str(root)}, files, unreadable)
    if stored_version(folder) != version:
        with preparing(folder):
            if stored_version(folder) != version:  # else another process has prepared it
                prepare()
    checked_bytes = config.device_limit_mb * 10**6
    try:
        source = open_prepared(folder, checked_bytes=checked_bytes)
    except InputError as error:
        _log.warning("%s. The files are decoded again.", error)
        with preparing(folder):
            prepare()
        source = open_prepared(folder, checked_bytes=checked_bytes)
    kept = _without_skipped(files, source.skipped)
    paths = {split: [str(file.path) for file in kept[split]] for split in kept}
    return replace(source, origin=str(root), files=paths)


def _version(root: Path, class_names: Sequence[str], files: Files) -> str:
    """Returns a short digest of names, labels, sizes and times of all files."""
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    base = root if root.is_dir() else root.parent
    for split, members in files.items():
        for path, label in members:
            state = path.stat()
            facts = (split, os.path.relpath(path, base), label, state.st_size, state.st_mtime_ns)
            digest.update(repr(facts).encode())
    return digest.hexdigest()[:12]


def _without_skipped(files: Files, skipped: Sequence[str]) -> Files:
    left_out = set(skipped)
    return {
        split: [file for file in members if str(file.path) not in left_out]
        for split, members in files.items()
    }


def _prepare(
    config: DataConfig,
    folder: Path,
    facts: dict[str, Any],
    files: Files,
    unreadable: Unreadable,
) -> None:
    """Decodes all files into a folder of arrays. Broken files are found before anything remains."""
    root, how = facts["origin"], _preprocessing(config, facts["origin"], files)
    skipped: list[str] = []
    while True:
        total = sum(map(len, files.values()))
        _log.info("decoding %d images of %s into %s (once)", total, root, folder)
        reader = _Reader(how, total)
        try:
            with reader:
                splits = {s: (len(files[s]), how.shape, reader.read(files[s])) for s in files}
                options: Any = {"preprocessing": how, "skipped": skipped, "splits": splits}
                write_prepared(folder, **facts, **options)
            return
        except _UnreadableError as error:
            shown = "; ".join(list(reader.broken.values())[:_LISTED])
            counted = f"{len(reader.broken)} of {total} files of {root} cannot be read: {shown}"
            if unreadable == "refuse":
                advice = 'remove them, or set data.options.unreadable = "skip"'
                raise InputError(f"{counted}; {advice}") from error
            _log.warning("%s. They are skipped.", counted)
            skipped += reader.broken
            files = _without_skipped(files, skipped)
            check_classes(root, facts["class_names"], files)


def _preprocessing(config: DataConfig, root: str, files: Files) -> Preprocessing:
    """Returns the preprocessing of a configuration, with size and color of the files if needed."""
    size, color = config.image_size, config.color
    if size is None or color == "auto":
        with ThreadPoolExecutor(usable_cpus()) as pool:
            headers = [h for split in files.values() for h in pool.map(_header, split) if h]
        sizes = {(height, width) for height, width, _ in headers}
        if size is None and len(sizes) != 1:
            raise InputError(
                f"the images of {root} differ in size: set data.image_size = [height, width]"
            )
        size = size or sizes.pop()
        if color == "auto":
            color = "rgb" if any(has_color for *_, has_color in headers) else "grayscale"
    return Preprocessing(size=size, color=color, resize=config.resize, background=config.background)


def _header(file: LabeledFile) -> tuple[int, int, bool] | None:
    try:
        return read_header(file.path)
    except InputError:  # reported when the file is decoded
        return None


class _UnreadableError(Exception):
    """Some files could not be read."""


class _Reader:
    """Decodes files in several threads, in order, with a progress bar.

    Attributes:
        broken: The error of each file that cannot be read, by path.
    """

    def __init__(self, how: Preprocessing, total: int) -> None:
        self.broken: dict[str, str] = {}
        self._how = how
        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("decoding images", total=total)
        self._pool = ThreadPoolExecutor(usable_cpus())

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._pool.shutdown()

    def read(self, files: Sequence[LabeledFile]) -> Iterator[Examples]:
        """Yields images and labels. Raises _UnreadableError at the end if a file is broken."""
        for start in range(0, len(files), _BATCH):
            batch = files[start : start + _BATCH]
            images = list(self._pool.map(self._read_one, batch))
            self._bar.advance(self._task, len(batch))
            if not self.broken:
                yield np.stack(images), np.array([file.label for file in batch])
        if self.broken:
            raise _UnreadableError

    def _read_one(self, file: LabeledFile) -> Images:
        try:
            return read_image(file.path, self._how)[0]
        except (InputError, OSError) as error:
            self.broken[str(file.path)] = str(error)
            return np.zeros(self._how.shape, np.uint8)
