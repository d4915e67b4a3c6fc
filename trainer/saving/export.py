"""Exports the model of a run, verifies the result in another process, and publishes it."""

import contextlib
import math
import re
import shlex
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import data as datasets
from trainer import tools
from trainer.data import Dataset
from trainer.errors import CheckError, InputError, expect, shell_command
from trainer.experiment import require_data, restore
from trainer.files import require_writable
from trainer.images import read_image
from trainer.keras_objects import count_trainable
from trainer.report import markdown_text
from trainer.run import open_run
from trainer.saving.formats import ExportFormat, find_format
from trainer.saving.runtimes import of_keras, predict_in_batches
from trainer.saving.safety import explained
from trainer.saving.versions import (
    ExportRecord,
    FileComparison,
    Origin,
    compare,
    compute_checksums,
    list_versions,
)

_MAX_VERIFIED_IMAGES = 10_000
_MAX_STORED_IMAGES = 256  # for `verify`
_CALIBRATION_IMAGES = 500
_MAX_COMPARED_FILES = 500
_MIN_AGREEMENT = 0.98  # of the classes by serving_files and by predict


def export(
    reference: str,
    kind: str,
    *,
    name: str | None = None,
    directory: str = "saved_models",
    runs_directory: str = "runs",
) -> tuple[Path, ExportRecord]:
    """Writes a new version of an exported model. It is published only after its verification.

    Args:
        reference: A run directory, its name, or "latest".
        kind: A format: "saved_model", "litert", "litert_int8" or "onnx".
        name: Name of the model. None: the names of the data set and of the network. For all
            formats but saved_model, "-FORMAT" is added, so that each name has one format.
        directory: Folder of the exported models.
        runs_directory: Folder of the run directories.

    Returns:
        The folder of the new version and the content of its export.json.

    Raises:
        InputError: There is no such run or format, or the folder cannot be written.
        MissingError: A package that the format needs is not installed.
        CheckError: The exported model differs from the model. Nothing is published.
    """
    export_format = find_format(kind)
    run = open_run(reference, runs_directory=runs_directory)
    origin = Origin.of(run)
    name = name or re.sub(r"[^\w.-]+", "-", f"{origin.spec.name}-{origin.config.model.name}")
    valid = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)
    expect(valid, "--name", "letters, digits, '.', '_' and '-'", repr(name))
    require_writable(directory, "--directory")
    data = datasets.load(origin.config.data)
    require_data(run.name, origin.spec.fingerprint, data.spec)
    model = restore(run, precision="float32")
    folder = Path(directory) / (name if kind == "saved_model" else f"{name}-{kind}")
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as partial:
            record = _write(model, origin, data, export_format, Path(partial))
            return _publish(Path(partial), folder, record), record
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from None


def _write(
    model: keras.Model, origin: Origin, data: Dataset, export_format: ExportFormat, folder: Path
) -> ExportRecord:
    """Writes and verifies an exported model in an empty folder that is not published yet."""
    seed = origin.config.data.split_seed
    # Sampled at random, because the data may be sorted by class.
    images, labels = data.test.sample(_MAX_VERIFIED_IMAGES, seed).read()
    calibration = data.train.sample(_CALIBRATION_IMAGES, seed).read()[0]
    check: dict[str, Any] = {"images": images, "labels": labels}
    check["probabilities"] = predict_in_batches(of_keras(model), images)
    with explained(f"{origin.run} cannot be written as {export_format.name}"):
        export_format.write(model, origin.spec, calibration, folder / export_format.file)
    record = ExportRecord(
        **dict(origin),
        format=export_format.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=model.count_params(),
        trainable_parameters=count_trainable(model),
        verified=compare(export_format, folder, check),
        files=_compare_files(model, data, folder) if export_format.name == "saved_model" else None,
        sha256=compute_checksums(folder),
    )
    step = math.ceil(len(images) / _MAX_STORED_IMAGES)
    np.savez(folder / "check.npz", **{key: array[::step] for key, array in check.items()})
    (folder / "export.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def _compare_files(model: keras.Model, data: Dataset, folder: Path) -> FileComparison | None:
    """Sends original files of the test split through `serving_files` and through `predict`.

    Raises:
        CheckError: The classes of more than a few files differ.
    """
    how, test = data.spec.preprocessing, data.test.sample(_MAX_COMPARED_FILES, 0)
    if how is None or test.files is None:
        return None
    signature = tf.saved_model.load(str(folder)).signatures["serving_files"]
    served, pixels, labels = [], [], []
    for row in test.rows:
        file = Path(test.files[row])
        with contextlib.suppress(tf.errors.InvalidArgumentError):  # for example TIFF
            served.append(int(signature(image_bytes=tf.constant([file.read_bytes()]))["class"][0]))
            pixels.append(read_image(file, how)[0])
            labels.append(int(test.labels[row]))
    if not labels:
        return None
    by_server, truth = np.array(served), np.array(labels)
    by_predict = predict_in_batches(of_keras(model), np.stack(pixels)).argmax(axis=1)
    agreement = float((by_server == by_predict).mean())
    if agreement < _MIN_AGREEMENT and (by_server != by_predict).sum() > 1:
        raise CheckError(
            f"serving_files and predict agree on {agreement:.1%} of {len(truth)} test files: "
            f"expected {_MIN_AGREEMENT:.0%} or more"
        )
    return FileComparison(
        images=len(truth),
        unsupported=len(test) - len(truth),
        agreement=agreement,
        accuracy=float((by_server == truth).mean()),
        predict_accuracy=float((by_predict == truth).mean()),
    )


def _publish(partial: Path, folder: Path, record: ExportRecord) -> Path:
    """Renames a finished version to the next free number, which its card contains."""
    partial.chmod(0o755)  # temporary folders are private
    folder.mkdir(exist_ok=True)
    while True:
        version = folder / str(max(list_versions(folder), default=0) + 1)
        (partial / "README.md").write_text(model_card(record, version), encoding="utf-8")
        try:
            return partial.rename(version)
        except OSError:
            if not version.exists():  # else another process took this number
                raise


def model_card(record: ExportRecord, version: Path) -> str:
    """Returns the README of an exported model: its facts, and the commands to use it."""
    version = version.absolute()  # Docker accepts absolute paths only
    model = version.parent
    values = {
        "record": record,
        "version": version,
        "model": model,
        "path": str(version),
        "classes": ", ".join(map(markdown_text, record.spec.class_names)),
        "verify": shell_command("verify", version),
        "serve": shell_command("serve", model.name, "--directory", model.parent),
        "mount": shlex.quote(f"{model}:/models/{model.name}"),
    }
    names = ["model_card", *(["model_card_files"] if record.files else [])]
    names += ["model_card_docker", "model_card_request"] if record.format == "saved_model" else []
    if "serving" in tools.names() and record.format == "saved_model":
        names.insert(-1, "model_card_serve")
    texts = [Path(__file__).with_name(f"{name}.txt").read_text("utf-8") for name in names]
    return "\n".join(texts).format(**values)
