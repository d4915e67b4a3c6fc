"""Decoded data on disk: one .npy file per array.

tensorflow-datasets stores images as PNG in record files. Decoding all of MNIST takes seconds at
each start. These files are memory-mapped: they open within milliseconds, and a data set that is
larger than memory can be streamed.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic import BaseModel, ConfigDict

from trainer.data import SPLITS, Examples, Source
from trainer.errors import InputError, expect
from trainer.files import NPY_ERRORS, sha256
from trainer.images import Preprocessing

_log = logging.getLogger(__name__)

_DESCRIPTION = "prepared.json"

# Prefix of the folders of unfinished preparations; a killed process leaves them behind.
PARTIAL = ".trainer-partial-"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bytes: int
    sha256: str


class _Prepared(BaseModel):
    """The content of prepared.json."""

    model_config = ConfigDict(extra="forbid")
    name: str
    version: str
    class_names: list[str]
    origin: str
    fingerprint: str
    preprocessing: Preprocessing | None = None
    skipped: list[str] = []  # files that could not be read
    files: dict[str, _File]


def _file(path: Path, checksum: str | None = None) -> _File:
    return _File(bytes=path.stat().st_size, sha256=checksum or sha256(path))


def write_prepared(
    folder: Path,
    *,
    splits: Mapping[str, tuple[int, tuple[int, int, int], Iterable[Examples]]],
    **facts: Any,
) -> None:
    """Writes decoded splits batch by batch, so memory does not grow with the data set.

    The folder appears complete or not at all: a temporary folder is filled and renamed.

    Args:
        folder: Destination; prepared data in it is replaced.
        splits: By name ("train", optionally "validation" and "test"): number of images, shape of
            one image, and batches of images and labels with that number of images in total.
        facts: name, version, class_names, origin, preprocessing and skipped, as in `Source`.
    """
    refuse_foreign(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            digest = hashlib.sha256()
            for split in filter(splits.get, SPLITS):
                _write_split(new, split, *splits[split], digest)
            files = {path.name: _file(path) for path in new.iterdir()}
            prepared = _Prepared(**facts, fingerprint=digest.hexdigest(), files=files)
            (new / _DESCRIPTION).write_text(prepared.model_dump_json(indent=2), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)
    except OSError as error:
        raise not_writable(folder, error) from None


def not_writable(folder: Path, error: OSError) -> InputError:
    """Returns the error for a data folder that cannot be written."""
    return InputError(
        f"prepared data cannot be written to {folder} ({error.strerror or error}): choose another "
        "folder with --set data.directory=..."
    )


def refuse_foreign(folder: Path) -> None:
    """Raises InputError if a folder contains other files than prepared data, to protect them."""
    is_folder = not folder.is_symlink() and (folder.is_dir() or not folder.exists())
    expect(is_folder, str(folder), "a folder of prepared data", "a file or link")
    own = re.compile(rf"{re.escape(_DESCRIPTION)}|({'|'.join(SPLITS)})_(images|labels)\.npy")
    foreign = sorted(p.name for p in folder.glob("*") if not own.fullmatch(p.name))
    if foreign:
        raise InputError(
            f"{folder} is reserved for prepared data but contains other files "
            f"({', '.join(foreign[:4])}): nothing was changed; move these files, or choose another "
            "folder with --set data.directory=..."
        )


def stored_version(folder: Path) -> str | None:
    """Returns the version of prepared data; None: there is none, or it is damaged."""
    try:
        return _Prepared.model_validate_json((folder / _DESCRIPTION).read_bytes()).version
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks the data folder for one process at a time, and removes unfinished preparations."""
    lock = filelock.FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _log.info("another process prepares data in %s: waiting for it", directory)
            lock.acquire()
    except OSError as error:
        raise not_writable(directory, error) from None
    try:
        for partial in directory.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial)
        yield
    finally:
        lock.release()


def open_prepared(folder: Path, *, checked_bytes: int = 0) -> Source:
    """Opens prepared data; images stay on disk until they are read.

    Args:
        folder: Contains the files.
        checked_bytes: Verify the SHA-256 of files up to this size.

    Raises:
        InputError: A file is missing, damaged or changed.
    """
    refuse_foreign(folder)
    examples: dict[str, Any] = {}
    try:
        prepared = _Prepared.model_validate_json((folder / _DESCRIPTION).read_bytes())
        for name, file in prepared.files.items():
            found = _file(folder / name, None if file.bytes <= checked_bytes else file.sha256)
            if found != file:
                raise ValueError(f"{folder / name}: expected {file}, received {found}")
        for split in SPLITS:
            if f"{split}_images.npy" in prepared.files:
                images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
                labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
                examples[split] = images, labels
        if "train" not in examples:
            raise ValueError("no train images")
    except NPY_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"prepared data in {folder} is damaged ({reason}); prepare it again with "
            "`trainer data prepare --overwrite` and the same configuration"
        ) from None
    facts = dict(prepared)
    del facts["files"]
    return Source(**facts | examples | {"origin": f"prepared in {folder} from {prepared.origin}"})


def _write_split(
    folder: Path,
    split: str,
    count: int,
    shape: tuple[int, int, int],
    batches: Iterable[Examples],
    digest: Any,
) -> None:
    """Writes the images of a split behind an .npy header with the final shape, then the labels."""
    all_labels, where = [], f"split {split!r}"
    with (folder / f"{split}_images.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        digest.update(repr((count, *shape)).encode())
        for images, labels in batches:
            fits = images.dtype == np.uint8 and images.shape[1:] == shape
            received = f"{images.dtype} {list(images.shape[1:])}"
            expect(fits, where, f"batches of uint8 images of shape {list(shape)}", received)
            data = np.ascontiguousarray(images).data
            file.write(data)
            digest.update(data)
            all_labels.append(np.asarray(labels, dtype="<i4"))
        file.flush()
        os.fsync(file)
    together = np.concatenate(all_labels)
    expect(len(together) == count, where, f"{count} images", len(together))
    digest.update(together.data)
    np.save(folder / f"{split}_labels.npy", together)
