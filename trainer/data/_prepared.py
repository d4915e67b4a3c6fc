"""Decoded data on disk: one .npy file per array.

tensorflow-datasets stores images as PNG in record files. Decoding all of MNIST takes seconds at
each start. These files are memory-mapped: they open within milliseconds, and a data set that is
larger than memory can be streamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic_core import to_json

from trainer.data import SPLITS, Examples, Source
from trainer.errors import InputError, expect
from trainer.files import sha256
from trainer.preprocessing import Preprocessing

_DESCRIPTION = "prepared.json"
_OWN_FILES = {_DESCRIPTION} | {f"{s}_{part}.npy" for s in SPLITS for part in ("images", "labels")}

# Prefix of the folders of unfinished preparations; a killed process leaves them behind.
PARTIAL = ".trainer-partial-"


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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        digest = hashlib.sha256()
        for split in filter(splits.get, SPLITS):
            _write_split(new, split, *splits[split], digest)
        facts["fingerprint"] = digest.hexdigest()
        facts["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in new.iterdir()
        }
        text = to_json(facts, indent=2).decode()
        (new / _DESCRIPTION).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)


def refuse_foreign(folder: Path) -> None:
    """Raises InputError if a folder contains other files than prepared data, to protect them."""
    foreign = sorted({path.name for path in folder.glob("*")} - _OWN_FILES)
    if foreign:
        raise InputError(
            f"{folder} is reserved for prepared data but contains other files "
            f"({', '.join(foreign[:4])}): nothing was changed; move these files, or choose another "
            "folder with --set data.directory=..."
        )


def open_prepared(folder: Path, *, checked_bytes: int = 0) -> Source:
    """Opens prepared data; images stay on disk until they are read.

    Raises InputError if a file is damaged. The SHA-256 of files up to `checked_bytes` is verified.
    """
    refuse_foreign(folder)
    try:
        facts = json.loads((folder / _DESCRIPTION).read_bytes())
        files = facts.pop("files")
        for name, expected in files.items():
            found = {"bytes": (folder / name).stat().st_size, "sha256": expected["sha256"]}
            if expected["bytes"] <= checked_bytes:
                found["sha256"] = sha256(folder / name)
            if found != expected:
                raise ValueError(f"{folder / name}: expected {expected}, received {found}")
        for split in SPLITS:
            if f"{split}_images.npy" in files:
                images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
                labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
                facts[split] = images, labels
        if facts.get("preprocessing") is not None:
            facts["preprocessing"] = Preprocessing.model_validate(facts["preprocessing"])
        facts["origin"] = f"prepared in {folder} from {facts['origin']}"
        return Source(**facts)
    except Exception as error:  # numpy parses the header of a file as Python literals
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise InputError(
            f"prepared data in {folder} is damaged ({reason}); prepare it again with "
            "`trainer data prepare --overwrite` and the same configuration"
        ) from None


def stored_version(folder: Path) -> str | None:
    """Returns the version of prepared data; None: there is none, or it is damaged."""
    try:
        return str(json.loads((folder / _DESCRIPTION).read_bytes())["version"])
    except (OSError, ValueError, LookupError):
        return None


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[None]:
    """Locks the data folder for one process at a time, and removes unfinished preparations.

    Raises:
        InputError: It cannot be written.
    """
    directory = folder.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / ".lock"):
            for partial in directory.glob(f"{PARTIAL}*"):  # of a process that was killed
                shutil.rmtree(partial)
            yield
    except OSError as error:
        raise InputError(
            f"prepared data cannot be written to {folder} ({error.strerror or error}): choose "
            "another folder with --set data.directory=..."
        ) from None


def _write_split(
    folder: Path,
    split: str,
    count: int,
    shape: tuple[int, int, int],
    batches: Iterable[Examples],
    digest: Any,
) -> None:
    """Writes the images of a split behind an .npy header with the final shape, then the labels."""
    all_labels = []
    digest.update(repr((count, *shape)).encode())
    with (folder / f"{split}_images.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for images, labels in batches:
            data = np.ascontiguousarray(images).data
            file.write(data)
            digest.update(data)
            all_labels.append(np.asarray(labels, dtype="<i4"))
        written, size = file.tell() - start, count * int(np.prod(shape))
        file.flush()
        os.fsync(file)
    together = np.concatenate(all_labels)
    fits = written == size and len(together) == count
    expected = f"{count} images of shape {list(shape)}, {size} bytes"
    expect(fits, f"split {split!r}", expected, f"{len(together)} images, {written} bytes")
    digest.update(together.data)
    np.save(folder / f"{split}_labels.npy", together)
