"""Files and folders: atomic writing, checksums, and the check that a folder can be written."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a file beside `path`, makes it durable and renames it into place.

    A reader sees the old file or the new one, never a part.

    Args:
        path: Where the file shall be.
        write: Takes the path to fill. The ending is that of `path`, as Keras chooses by it.
    """
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=".partial-", suffix="".join(path.suffixes)
    )
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        beside.chmod(0o666 & ~_umask())
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
        _make_durable(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_atomic(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_durable(folder: Path) -> None:
    """Has the system write a folder's names to the disk, where it can."""
    with contextlib.suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    # mkstemp makes a file that only its owner may read; the umask can be read only by setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def require_writable(directory: str, option: str = "logging.directory") -> None:
    """Refuses a folder for runs that cannot be written, before anything slow has started.

    Args:
        directory: The folder.
        option: What a person names it by, for the message.

    Raises:
        InputError: The folder, or the nearest parent that exists, cannot be written.
    """
    path = Path(directory).absolute()
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
    except OSError as error:  # a name too long for the file system
        raise InputError(f"{option}: {error}") from None
    if not directory or not path.is_dir() or not os.access(path, os.W_OK):
        why = "cannot be written" if path.is_dir() else "is a file, not a folder"
        raise InputError(f"{option} = {directory!r}: {path} {why}; choose another folder")
