"""Exports the model of a run, verifies the result in another process, and publishes it."""

import contextlib
import itertools
import math
import re
import shlex
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import keras
import numpy as np

from trainer import data as datasets
from trainer import keras_objects
from trainer.data import Dataset
from trainer.errors import InputError, shell_command
from trainer.experiment import require_data, restore
from trainer.files import require_writable
from trainer.report import markdown_text
from trainer.run import Run, open_run
from trainer.saving.files import Origin
from trainer.saving.formats import ExportFormat, ExportSource, find_format
from trainer.saving.runtimes import of_keras, predict_in_batches
from trainer.saving.versions import (
    CARD,
    CHECK,
    RECORD,
    ExportRecord,
    compare,
    compute_checksums,
    list_versions,
)

_MAX_VERIFIED_IMAGES = 10_000
_MAX_STORED_IMAGES = 256  # for `verify`
_CALIBRATION_IMAGES = 500


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
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"--name: expected letters, digits, '.', '_' and '-', received {name!r}")
    require_writable(directory, "--directory")
    data = datasets.load(origin.config.data)
    require_data(run, origin.spec.fingerprint, data.spec)
    model = restore(run, precision="float32")  # before a folder is created
    folder = Path(directory) / (name if kind == "saved_model" else f"{name}-{kind}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            record = _write(run, model, origin, data, export_format, Path(partial))
            return _publish(Path(partial), folder, record), record
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty


def _write(
    run: Run,
    model: keras.Model,
    origin: Origin,
    data: Dataset,
    export_format: ExportFormat,
    folder: Path,
) -> ExportRecord:
    """Writes and verifies an exported model in an empty folder that is not published yet."""
    precision, seed = origin.config.training.precision, origin.config.data.split_seed
    # Sampled at random, because the data may be sorted by class.
    images, labels = data.test.sample(_MAX_VERIFIED_IMAGES, seed).read()
    calibration = data.train.sample(_CALIBRATION_IMAGES, seed).read()[0]
    expected, difference = predict_in_batches(of_keras(model), images), 0.0
    check = {"images": images, "labels": labels, "probabilities": expected}
    if precision != "float32":
        trained = predict_in_batches(of_keras(restore(run)), images)
        difference = float(abs(trained - expected).max())
    try:
        source = ExportSource(model, origin.spec, calibration)
        export_format.write(source, folder / export_format.file)
    except OSError:
        raise
    except Exception as error:  # each converter raises its own errors
        reason = keras_objects.explain(error)
        raise InputError(
            f"{run.name} cannot be written as {export_format.name}: {reason}"
        ) from error
    record = ExportRecord(
        **dict(origin),
        format=export_format.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=model.count_params(),
        precision=precision,
        precision_difference=difference,
        verified=compare(export_format, folder, check),
        sha256=compute_checksums(folder),
    )
    step = slice(None, None, math.ceil(len(images) / _MAX_STORED_IMAGES))
    np.savez(folder / CHECK, **{key: array[step] for key, array in check.items()})
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def _publish(partial: Path, folder: Path, record: ExportRecord) -> Path:
    """Renames a finished version to the next free number, which its card contains."""
    partial.chmod(0o755)  # temporary folders are private
    for number in itertools.count(max(list_versions(folder), default=0) + 1):
        version = folder / str(number)
        (partial / CARD).write_text(model_card(record, version), encoding="utf-8")
        try:
            return partial.rename(version)
        except OSError:
            if not version.exists():  # else another process took this number
                raise
    raise AssertionError("not reached")


def model_card(record: ExportRecord, version: Path) -> str:
    """Returns the README of an exported model: its facts, and the commands to use it."""
    spec, model = record.spec, version.parent
    outside = "Run these commands in the folder where `trainer export` ran.\n\n"
    classes = ", ".join(map(markdown_text, spec.class_names[:20]))
    url = f"http://localhost:8501/v1/models/{quote(model.name)}"
    takes_files = spec.preprocessing is not None
    serving = _fill(
        "model_card_serving.txt",
        variable=shlex.quote(f"MODEL_NAME={model.name}"),
        here="" if model.is_absolute() else '"$PWD"/',  # Docker accepts absolute paths only
        mount=shlex.quote(f"{model}:/models/{model.name}"),
        serve=shell_command("serve", model.name, "--directory", model.parent),
        # The image is piped: a photo is longer than a command line argument may be.
        request=_fill("model_card_request.txt", url=url) if takes_files else f"curl {url}/metadata",
    )
    return _fill(
        "model_card.txt",
        record=record,
        version=version,
        shape=", ".join(map(str, spec.image_shape)),
        classes=classes + (", ..." if spec.class_count > 20 else ""),
        where="" if version.is_absolute() else outside,
        path=str(version),
        serving=serving if record.format == "saved_model" else "",
        verify=shell_command("verify", version),
    )


def _fill(template: str, **values: Any) -> str:
    """Returns a text file of this package with values in the place of its fields."""
    return Path(__file__).with_name(template).read_text(encoding="utf-8").format(**values)
