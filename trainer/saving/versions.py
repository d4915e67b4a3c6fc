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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from trainer.config import Config, parse_config
from trainer.data import DataSpec
from trainer.errors import CheckError, InputError
from trainer.experiment import spec_of
from trainer.files import sha256
from trainer.run import Run
from trainer.saving import runtimes
from trainer.saving.formats import MAX_POINTS_LOST, ExportFormat, find_format
from trainer.saving.safety import check_saved_model, explained

_NUMBER = re.compile("[0-9]{1,18}")  # fits into 64 bits


class Origin(BaseModel):
    """The run that a model came from."""

    model_config = ConfigDict(frozen=True)

    run: str
    config: Config
    spec: DataSpec  # the data that it was trained on

    @field_validator("config", mode="before")
    @classmethod
    def _accept_old_keys(cls, config: Any) -> Any:
        # Files of earlier versions have the old names of keys.
        stored = isinstance(config, dict)
        return parse_config(config, origin="configuration", stored=True) if stored else config

    @classmethod
    def of(cls, run: Run) -> Self:
        """Returns the origin of the model of a finished run."""
        return cls(run=run.name, config=run.config(), spec=spec_of(run))


class Verification(BaseModel):
    """Comparison of an exported model, in a separate process, with the float32 model."""

    images: int  # held-out images that both scored
    largest_difference: float  # of a probability, at batch sizes 1, 7 and 256
    agreement: float  # fraction of images with the same class
    accuracy: float  # of the exported model
    model_accuracy: float  # of the float32 model


class FileComparison(BaseModel):
    """Original files of the test split, by the signature `serving_files` and by `predict`."""

    images: int  # files that both read
    unsupported: int  # files in formats that TensorFlow cannot read
    agreement: float  # fraction of files with the same class
    accuracy: float  # of serving_files
    predict_accuracy: float  # of the same files by `predict`


class ExportRecord(Origin):
    """The content of export.json."""

    format: str
    time: str  # of the export (UTC)
    parameters: int
    trainable_parameters: int | None = None  # None: an earlier version wrote the file
    verified: Verification
    files: FileComparison | None = None  # None: no files, or the format does not read files
    sha256: dict[str, str]  # of each file of the exported model


def read_record(folder: Path) -> ExportRecord | None:
    """Reads the export.json of a version. None: there is none.

    Raises:
        InputError: The file is damaged.
    """
    file = folder / "export.json"
    if not file.is_file():
        return None
    with explained(f"{file} cannot be read"):
        return ExportRecord.model_validate_json(file.read_bytes())


def artifact_files(artifact: Path) -> list[Path]:
    """Returns the files of an exported model (a file or a version folder), without our own."""
    ours = [artifact / name for name in ("export.json", "check.npz", "README.md")]
    return [p for p in (artifact, *artifact.rglob("*")) if p.is_file() and p not in ours]


def compute_checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each of these files in a version folder."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in artifact_files(folder)}


def verify_checksums(folder: Path, record: ExportRecord) -> None:
    """Compares the files of a version with the recorded checksums.

    Raises:
        CheckError: A file was changed, is missing, or was added.
    """
    found = compute_checksums(folder)
    for name, _ in sorted(record.sha256.items() ^ found.items()):
        expected = record.sha256.get(name)
        raise CheckError(f"{folder / name}: expected sha256 {expected}, found {found.get(name)}")


def list_versions(folder: Path) -> dict[int, Path]:
    """Returns the version folders of a model by number, or nothing if the folder is unreadable.

    As in TensorFlow Serving, a version is any name that is a number. If several names are the same
    number, the one with the fewest zeros is used. For a version folder, the result is the folder
    itself.
    """
    with contextlib.suppress(OSError):
        holds_model = any((folder / name).is_file() for name in ("saved_model.pb", "export.json"))
        is_version = holds_model and _NUMBER.fullmatch(folder.name)
        paths = [folder] if is_version else sorted(folder.iterdir())
        return {int(path.name): path for path in paths if _NUMBER.fullmatch(path.name)}
    return {}


def find_version(path: Path) -> Path:
    """Returns a version folder: the path itself, or its newest version.

    Raises:
        InputError: There is no exported model.
    """
    found = {0: path} if (path / "export.json").is_file() else list_versions(path)
    if not found:
        raise InputError(f"expected an exported model (with export.json), received {path}")
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
        raise InputError(f"{folder}/export.json cannot be read: there is no such file")
    export_format = find_format(record.format)
    verify_checksums(folder, record)
    if record.format == "saved_model":
        check_saved_model(folder, trust=trust)
    try:
        with np.load(folder / "check.npz", allow_pickle=False) as stored:
            check = dict(stored)
    except Exception as error:  # a damaged file raises many types
        raise CheckError(f"{folder}/check.npz was changed or is damaged: {error}") from None
    return folder, compare(export_format, folder, check)


def compare(export_format: ExportFormat, folder: Path, check: dict[str, Any]) -> Verification:
    """Scores held-out images with an exported model in another process and compares the results.

    `check` holds the images, their labels, and their probabilities from the float32 model.

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
    most_lost = max(MAX_POINTS_LOST / 100, 1 / len(images))  # one more wrong image is accepted
    # "not <=" also refuses NaN.
    if not result.largest_difference <= export_format.max_difference or lost > most_lost:
        raise CheckError(
            f"{export_format.name} differs from the model: largest difference of a probability "
            f"{result.largest_difference:.3g} (at most {export_format.max_difference:g}), "
            f"{lost:.4f} less accuracy (at most {most_lost:.4f})"
        )
    return result


def _predict_in_process(export_format: ExportFormat, folder: Path, images: Any) -> Any:
    """Runs runtimes.py as a program and returns the probabilities that it writes."""
    program = [runtimes.__file__, export_format.name, str(folder / export_format.file)]
    with tempfile.TemporaryDirectory() as scratch:
        arrays = [f"{scratch}/images.npy", f"{scratch}/probabilities.npy"]
        np.save(arrays[0], images)
        run_python([*program, *arrays], f"{export_format.name}: its runtime fails")
        return np.load(arrays[1])


def run_python(arguments: Sequence[str], failure: str) -> str:
    """Runs Python in another process, which cannot use a GPU, and returns what it prints.

    Raises:
        CheckError: The process fails: `failure`, and the last line that it writes to stderr.
    """
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    environment, command = os.environ | settings, [sys.executable, "-P", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise CheckError(f"{failure}: {last}")
    return done.stdout
