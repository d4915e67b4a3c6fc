"""Files and folders: atomic writing, checksums, and a check for write access."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a new file next to `path`, flushes it to the disk, and renames it.

    A reader sees the old file or the new one, never a part.

    Args:
        path: The file to write.
        write: Takes the path of the new file, which has the ending of `path` (Keras needs it).
    """
    partial = path.with_name(f".partial-{uuid.uuid4().hex}{''.join(path.suffixes)}")
    try:
        write(partial)
        _flush(partial)
        partial.replace(path)
        with contextlib.suppress(OSError):  # not every system can open a folder
            _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file; a reader never sees a part of it."""
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Writes the content of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_writable(directory: str, option: str = "logging.directory") -> None:
    """Raises InputError if a folder, or its nearest parent that exists, cannot be written.

    It is called before anything slow starts. `option` sets the folder, for the message.
    """
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    if not directory or not path.is_dir() or not os.access(path, os.W_OK):
        why = "cannot be written" if path.is_dir() else "is a file, not a folder"
        raise InputError(f"{option} = {directory!r}: {path} {why}; choose another folder")
