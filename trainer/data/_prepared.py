"""Decoded data on disk: one .npy file for each array, read without decoding anything twice.

tensorflow-datasets keeps images as PNG inside record files; decoding all of MNIST takes seconds at
each start. These files are mapped instead, so that opening them takes milliseconds and a set larger
than memory can be streamed.
"""

import hashlib
import os
import re
import shutil
import tempfile
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.data import Images, Source
from trainer.errors import InputError
from trainer.files import sha256

_DESCRIPTION = "prepared.json"

# What numpy raises for a file that is no array: it reads the header as Python literals.
NPY_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, RecursionError),
    *(SyntaxError, tokenize.TokenError),
)

# How folders begin that are filled beside their place; a killed process leaves them.
PARTIAL = ".trainer-partial-"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bytes: int
    sha256: str


class _Prepared(BaseModel):
    """What prepared.json holds."""

    model_config = ConfigDict(extra="forbid")
    name: str
    version: str
    class_names: list[str]
    origin: str
    fingerprint: str
    files: dict[str, _File]


def write_prepared(
    folder: Path,
    *,
    name: str,
    version: str,
    class_names: list[str],
    origin: str,
    splits: Mapping[str, tuple[int, tuple[int, int, int], Iterable[tuple[Images, NDArray[Any]]]]],
) -> None:
    """Writes decoded splits, batch by batch, so that memory does not grow with the set.

    The folder appears whole or not at all: it is filled beside its place and renamed.

    Args:
        folder: Where the files shall be; prepared data that is there is replaced.
        name: Of the data set.
        version: Of the data set.
        class_names: In the order of the labels.
        origin: Where the data came from, in words.
        splits: By name ("train", perhaps "validation" and "test"): the number of images, the shape
            of one, and batches of images and labels that add up to that number.

    Raises:
        InputError: The batches hold another number of images or other shapes, the disk cannot be
            written, or the folder holds what was not written here.
    """
    refuse_foreign(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{PARTIAL}{folder.name}-"))
    except OSError as error:
        raise InputError(
            f"prepared data cannot be written to {folder} ({error.strerror}): "
            "choose another folder with --set data.directory=..."
        ) from None
    try:
        digest = hashlib.sha256()
        files: dict[str, _File] = {}
        for split in ("train", "validation", "test"):
            if split in splits:
                files |= _write_split(beside, split, *splits[split], digest)
        prepared = _Prepared(
            name=name,
            version=version,
            class_names=class_names,
            origin=origin,
            fingerprint=digest.hexdigest(),
            files=files,
        )
        (beside / _DESCRIPTION).write_text(prepared.model_dump_json(indent=2), encoding="utf-8")
        beside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    except OSError as error:
        raise InputError(f"prepared data cannot be written to {folder}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Refuses a place that holds anything but prepared data: it would be replaced, and lost.

    Raises:
        InputError: It is a file or a link, or a folder with files that were not written here.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: expected a folder of prepared data, found a file or link")
    own = re.compile(rf"{re.escape(_DESCRIPTION)}|(train|validation|test)_(images|labels)\.npy")
    foreign = [p.name for p in folder.glob("*") if not own.fullmatch(p.name)]
    if foreign:
        raise InputError(
            f"{folder} is where prepared data would lie, and holds what was not prepared here "
            f"({', '.join(sorted(foreign)[:4])}): nothing was touched; move that, or choose "
            "another folder with --set data.directory=..."
        )


def open_prepared(folder: Path) -> Source:
    """Opens prepared data; images stay on disk until they are read.

    Raises:
        InputError: A file is missing, empty or truncated.
    """
    remedy = "make it anew with `trainer data prepare --overwrite` and the same configuration"
    refuse_foreign(folder)
    try:
        text = (folder / _DESCRIPTION).read_text(encoding="utf-8")
        prepared = _Prepared.model_validate_json(text)
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"prepared data in {folder} is damaged ({reason}); {remedy}") from None
    for name, file in prepared.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != file.bytes:
            received = "no such file" if found is None else f"{found} bytes"
            raise InputError(
                f"prepared data is damaged: {path}: expected {file.bytes} bytes, "
                f"received {received}; {remedy}"
            )

    def examples(split: str) -> tuple[Images, NDArray[Any]] | None:
        if f"{split}_images.npy" not in prepared.files:
            return None
        try:
            images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
        except NPY_ERRORS as error:
            raise InputError(f"prepared data in {folder} is damaged ({error}); {remedy}") from None
        return images, labels

    train = examples("train")
    if train is None:
        raise InputError(f"prepared data in {folder} is damaged (no train images); {remedy}")
    return Source(
        name=prepared.name,
        version=prepared.version,
        class_names=prepared.class_names,
        train=train,
        validation=examples("validation"),
        test=examples("test"),
        origin=f"prepared in {folder} from {prepared.origin}",
        fingerprint=prepared.fingerprint,
    )


def check_sums(folder: Path) -> list[str]:
    """Reads every prepared file and compares its SHA-256 with the one noted when it was written.

    Returns:
        The names of the files that were compared.

    Raises:
        InputError: A file has changed.
    """
    prepared = _Prepared.model_validate_json((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    for name, file in prepared.files.items():
        found = sha256(folder / name)
        if found != file.sha256:
            raise InputError(
                f"prepared data is damaged: {folder / name}: expected sha256 {file.sha256}, "
                f"found {found}; make it anew with `trainer data prepare --overwrite` and the "
                "same configuration"
            )
    return list(prepared.files)


def _write_split(
    folder: Path,
    split: str,
    count: int,
    shape: tuple[int, int, int],
    batches: Iterable[tuple[Images, NDArray[Any]]],
    digest: Any,
) -> dict[str, _File]:
    """Appends batches to an .npy file whose header already states the final shape."""
    path = folder / f"{split}_images.npy"
    labels = []
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        digest.update(repr((count, *shape)).encode())
        for images, some in batches:
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                raise InputError(
                    f"split {split!r}: expected batches of uint8 images of shape {list(shape)}, "
                    f"received {images.dtype} {list(images.shape[1:])}"
                )
            data = np.ascontiguousarray(images).data
            file.write(data)
            digest.update(data)
            labels.append(np.asarray(some, dtype="<i4"))
        file.flush()
        os.fsync(file.fileno())
    found = sum(map(len, labels))
    if found != count:
        raise InputError(f"split {split!r}: expected {count} images, received {found}")
    together = np.concatenate(labels)
    digest.update(together.data)
    np.save(folder / f"{split}_labels.npy", together)
    written = (path, folder / f"{split}_labels.npy")
    return {p.name: _File(bytes=p.stat().st_size, sha256=sha256(p)) for p in written}
