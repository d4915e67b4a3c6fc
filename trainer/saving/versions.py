"""The versions of an exported model: folders in the layout of TensorFlow Serving, verified.

saved_models/<name>/<version>/
    saved_model.pb ...            or model.tflite, model.onnx
    export.json                   origin, checksums and the result of the verification
    check.npz                     held-out images and the model's probabilities, for `verify`
    README.md                     the model card
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trainer.data import Images
from trainer.errors import CheckError, InputError
from trainer.files import sha256
from trainer.saving import runtimes
from trainer.saving.files import Origin
from trainer.saving.formats import ExportFormat, find_format
from trainer.saving.safety import check_saved_model

RECORD, CHECK, CARD = "export.json", "check.npz", "README.md"
# The arrays of check.npz: images, their labels, and their probabilities from the float32 model,
# float32 [n, classes].
Check = dict[str, NDArray[Any]]


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


def read_record(folder: Path) -> ExportRecord | None:
    """Reads the export.json of a version. None: there is none.

    Raises:
        InputError: The file is damaged.
    """
    try:
        return ExportRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, InputError) as error:
        raise InputError(f"{folder / RECORD} cannot be read: {error}") from None


def artefact_files(artefact: Path) -> list[Path]:
    """Returns the files of an exported model (a file or a version folder), without our own."""
    ours = [artefact / name for name in (RECORD, CHECK, CARD)]
    paths = [artefact, *sorted(artefact.rglob("*"))]
    return [path for path in paths if path.is_file() and path not in ours]


def compute_checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each of these files in a version folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in artefact_files(folder)}


def verify_checksums(folder: Path, record: ExportRecord) -> None:
    """Compares the files of a version with the recorded checksums.

    Raises:
        CheckError: A file was changed, is missing, or was added.
    """
    changed = record.sha256.items() ^ compute_checksums(folder).items()
    if changed:
        name = min(changed)[0]
        expected = record.sha256.get(name, "no such file")
        found = dict(changed - record.sha256.items()).get(name, "no such file")
        raise CheckError(f"{folder / name}: expected sha256 {expected}, found {found}")


def is_version(path: Path) -> bool:
    """Returns whether a path is a version folder: its name is a number, and it holds a model."""
    return _is_number(path) and any((path / name).is_file() for name in ("saved_model.pb", RECORD))


def list_versions(folder: Path) -> dict[int, Path]:
    """Returns the version folders of a model by number, or nothing if the folder is unreadable.

    As in TensorFlow Serving, a version is any name that is a 64-bit number. Leading zeros do not
    count. If several names are the same number, the one with the fewest zeros is used. For a
    version folder, the result is the folder itself.
    """
    with contextlib.suppress(OSError):
        paths = [folder] if is_version(folder) else sorted(filter(_is_number, folder.iterdir()))
        return {int(path.name): path for path in paths}
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


def verify(path: str | Path, *, trust: bool = False) -> tuple[Path, Verification]:
    """Compares an exported model with the checksums and probabilities stored next to it.

    Args:
        path: A version folder, or the folder of a model. Then its newest version is used.
        trust: Accept any operation in a SavedModel.

    Returns:
        The version folder and the result of the comparison.

    Raises:
        InputError: There is no exported model.
        MissingError: The runtime of the format is not installed.
        CheckError: A file was changed, or the results differ.
    """
    folder = find_version(Path(path))
    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder / RECORD} cannot be read: there is no such file")
    export_format = find_format(record.format)
    verify_checksums(folder, record)
    if record.format == "saved_model":
        check_saved_model(folder, trust=trust)
    try:
        with np.load(folder / CHECK, allow_pickle=False) as stored:
            check = {key: stored[key] for key in ("images", "labels", "probabilities")}
        found, count = check["probabilities"].shape, len(check["images"])
        if found != (count, record.spec.class_count) or not count:
            raise ValueError(f"probabilities of shape {list(found)}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckError(f"{folder / CHECK} was changed or is damaged: {error}") from None
    return folder, compare(export_format, folder, check)


def compare(export_format: ExportFormat, folder: Path, check: Check) -> Verification:
    """Scores held-out images with an exported model in another process and compares the results.

    Raises:
        CheckError: The process fails, or the difference exceeds the limits of the format.
    """
    images, labels, expected = check["images"], check["labels"], check["probabilities"]
    found = _predict_in_process(export_format, folder, images)
    few = expected[: runtimes.SMALL_BATCHES]
    classes, model_classes = found[-len(images) :].argmax(axis=1), expected.argmax(axis=1)
    result = Verification(
        images=len(images),
        largest_difference=float(abs(found - np.concatenate([few, few, expected])).max()),
        agreement=float((classes == model_classes).mean()),
        accuracy=float((classes == labels).mean()),
        model_accuracy=float((model_classes == labels).mean()),
    )
    lost = result.model_accuracy - result.accuracy
    # With few images, one more wrong image is within the limit.
    most_lost = max(export_format.max_points_lost / 100, 1 / len(images))
    # "not <=" also refuses NaN.
    if not result.largest_difference <= export_format.max_difference or lost > most_lost:
        raise CheckError(
            f"{export_format.name} differs from the model: largest difference of a probability "
            f"{result.largest_difference:.3g} (at most {export_format.max_difference:g}), accuracy "
            f"{result.accuracy:.4f} instead of {result.model_accuracy:.4f} (at most "
            f"{100 * most_lost:.2f} points less)"
        )
    return result


def _predict_in_process(
    export_format: ExportFormat, folder: Path, images: Images
) -> NDArray[np.float32]:
    """Runs runtimes.py as a program and returns its result."""
    artefact = (folder / export_format.file).absolute()
    # An empty entry would mean the current folder, and the process runs in another one.
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    python_path = os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    with tempfile.TemporaryDirectory() as scratch:
        np.save(f"{scratch}/images.npy", images)
        program = [sys.executable, "-P", runtimes.__file__, export_format.name, str(artefact)]
        done = subprocess.run(
            [*program, "images.npy", "probabilities.npy"],
            cwd=scratch,
            env=os.environ | settings | {"PYTHONPATH": python_path},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise CheckError(f"{export_format.name}: its runtime fails: {last[0]}")
        probabilities: NDArray[np.float32] = np.load(f"{scratch}/probabilities.npy")
        return probabilities


def _is_number(path: Path) -> bool:
    return re.fullmatch("[0-9]+", path.name) is not None and int(path.name) < 2**63
