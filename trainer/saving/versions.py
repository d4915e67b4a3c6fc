"""The folders of an exported model, in the layout of TensorFlow Serving.

saved_models/<name>/<version>/
    saved_model.pb ...            or model.tflite, model.onnx
    export.json                   origin, checksums and the result of the verification
    check.npz                     held-out images and the model's probabilities, for `verify`
    README.md                     the model card
"""

import contextlib
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trainer.errors import CheckError, InputError
from trainer.run import sha256
from trainer.saving.files import Origin

RECORD, CHECK, CARD = "export.json", "check.npz", "README.md"


class Verification(BaseModel):
    """Comparison of an exported model, in a separate process, with the float32 model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int  # held-out images that both scored
    largest_difference: float  # of a probability, at batch sizes 1, 7 and 256
    agreement: float  # fraction of images with the same class
    accuracy: float  # of the exported model
    model_accuracy: float  # of the float32 model


class ExportRecord(Origin):
    """The content of export.json."""

    format: str
    time: str  # of the export (UTC)
    parameters: int
    precision: str  # of the training
    precision_difference: float  # largest of a probability, between that precision and float32
    verified: Verification
    sha256: dict[str, str]  # of each file of the exported model


def read_record(folder: Path) -> ExportRecord:
    """Reads the export.json of a version.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        return ExportRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder / RECORD} cannot be read: {reason}") from None


def artefact_files(artefact: Path) -> list[Path]:
    """Returns the files of an exported model, without export.json, check.npz and README.md.

    Args:
        artefact: The version folder for a SavedModel, else the file in it.
    """
    if artefact.is_file():
        return [artefact]
    ours = [artefact / name for name in (RECORD, CHECK, CARD)]
    return [path for path in sorted(artefact.rglob("*")) if path.is_file() and path not in ours]


def compute_checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a version folder except export.json and the like."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in artefact_files(folder)}


def verify_checksums(folder: Path, record: ExportRecord) -> None:
    """Compares the files of a version with the recorded checksums.

    Raises:
        CheckError: A file was changed, is missing, or was added.
    """
    found = compute_checksums(folder)
    for name in sorted(record.sha256.keys() | found.keys()):
        if record.sha256.get(name) != found.get(name):
            raise CheckError(
                f"{folder / name}: expected sha256 {record.sha256.get(name, 'of no such file')}, "
                f"found {found.get(name, 'no such file')}"
            )


def is_version(path: Path) -> bool:
    """Returns whether a path is a version folder: its name is a number, and it holds a model."""
    return _is_number(path) and any((path / name).is_file() for name in ("saved_model.pb", RECORD))


def list_versions(folder: Path) -> dict[int, Path]:
    """Returns the version folders of a model by number, or nothing if the folder is unreadable.

    As in TensorFlow Serving, a version is any name that is a 64-bit number. Leading zeros do not
    count. If several names are the same number, the one with the fewest zeros is used.
    """
    with contextlib.suppress(OSError):
        return {int(path.name): path for path in sorted(filter(_is_number, folder.iterdir()))}
    return {}


def find_version(path: Path) -> Path:
    """Returns a version folder: the path itself, or its newest version.

    Raises:
        InputError: There is no exported model.
    """
    if (path / RECORD).is_file():
        return path
    found = list_versions(path)
    if not found:
        raise InputError(f"expected an exported model (with {RECORD}), received {path}")
    return found[max(found)]


def _is_number(path: Path) -> bool:
    return re.fullmatch("[0-9]+", path.name) is not None and int(path.name) < 2**63
