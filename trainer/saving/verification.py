"""Compares an exported model with the model it was made from."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data import Images, Labels
from trainer.errors import CheckError
from trainer.saving import runtimes
from trainer.saving.formats import ExportFormat, find_format
from trainer.saving.safety import check_saved_model
from trainer.saving.versions import (
    CHECK,
    Verification,
    find_version,
    read_record,
    verify_checksums,
)

Probabilities = NDArray[np.float32]


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
    export_format = find_format(record.format)
    export_format.require()
    verify_checksums(folder, record)
    if record.format == "saved_model":
        check_saved_model(folder, trust=trust)
    try:
        with np.load(folder / CHECK, allow_pickle=False) as stored:
            images, labels, expected = (stored[k] for k in ("images", "labels", "probabilities"))
        if expected.shape != (len(images), record.spec.class_count) or not len(images):
            raise ValueError(f"probabilities of shape {list(expected.shape)}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckError(f"{folder / CHECK} was changed or is damaged: {error}") from None
    return folder, compare(export_format, folder, images, labels, expected)


def compare(
    export_format: ExportFormat,
    folder: Path,
    images: Images,
    labels: Labels,
    expected: Probabilities,
) -> Verification:
    """Scores images with an exported model in another process and compares the probabilities.

    Args:
        export_format: The format.
        folder: The version folder.
        images: Held-out images.
        labels: Their labels.
        expected: Their probabilities from the float32 model, float32 [n, classes].

    Raises:
        CheckError: The process fails, or the difference exceeds the limits of the format.
    """
    found = _predict_in_process(export_format, folder, images)
    few = expected[: len(found["one"])]
    differences = [found["one"] - few, found["seven"] - few, found["all"] - expected]
    classes, model_classes = found["all"].argmax(axis=1), expected.argmax(axis=1)
    result = Verification(
        images=len(images),
        largest_difference=max(float(abs(d).max()) for d in differences),
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
) -> dict[str, Probabilities]:
    """Runs runtimes.py as a program and returns its results."""
    artefact = (folder / export_format.file).absolute()
    # An empty entry would mean the current folder, and the process runs in another one.
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    python_path = os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch) / "images.npy", Path(scratch) / "probabilities.npz"
        np.save(given, images)
        program = [sys.executable, "-P", runtimes.__file__]
        done = subprocess.run(
            [*program, export_format.name, str(artefact), str(given), str(result)],
            cwd=scratch,
            env=os.environ | settings | {"PYTHONPATH": python_path},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise CheckError(f"{export_format.name}: its runtime fails: {last[0]}")
        with np.load(result, allow_pickle=False) as file:
            return dict(file)
