"""Saves the model of a run as a Keras file, and loads a model of any format."""

import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from numpy.typing import NDArray

from trainer import data as datasets
from trainer.data import Images
from trainer.errors import InputError, expect
from trainer.experiment import require_data, restore
from trainer.files import write_atomic
from trainer.prediction import predict_files
from trainer.run import open_run
from trainer.saving import safety
from trainer.saving.formats import find_format
from trainer.saving.runtimes import RUNTIMES, Predict, of_keras, predict_in_batches
from trainer.saving.versions import Origin, artifact_files, find_version, read_record

_KINDS = {".tflite": "litert", ".onnx": "onnx"}


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be called on raw images."""

    path: Path
    kind: str  # "run", "keras" or a format of `trainer export`
    parameters: int | None  # None: not recorded
    bytes: int  # size of its files
    origin: Origin | None  # None: not recorded
    _predict: Predict = field(repr=False)

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Returns probabilities, float32 [n, classes], of uint8 [n, height, width, channels]."""
        return predict_in_batches(self._predict, images)

    def predict(self, paths: Sequence[str | Path], **options: Any) -> list[dict[str, Any]]:
        """Predicts the class of image files; see `prediction.predict_files`.

        Raises:
            InputError: The data that it was trained on is not recorded.
        """
        return predict_files(self, self._recorded_origin().spec, paths, **options)

    def describe(self) -> dict[str, Any]:
        """Returns format, input, output, size and origin as plain values."""
        spec = self.origin and self.origin.spec
        return {
            "path": str(self.path),
            "kind": self.kind,
            "input": spec and f"images uint8 {[None, *spec.image_shape]}",
            "output": spec and f"probabilities float32 {[None, spec.class_count]}",
            "classes": spec and list(spec.class_names),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "run": self.origin and self.origin.run,
            "data": spec and spec.name,
        }

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Scores a split ("train", "validation" or "test") of the data that it was trained on.

        Returns:
            Split, number of images, mean cross-entropy (for any training loss) and accuracy.

        Raises:
            InputError: The data is not recorded, is not available, or has changed.
        """
        origin = self._recorded_origin()
        data = datasets.load(origin.config.data)
        require_data(str(self.path), origin.spec.fingerprint, data.spec)
        images, labels = data.split(split).read()
        probabilities = self(images)
        of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
        return {
            "path": str(self.path),
            "kind": self.kind,
            "data": data.spec.name,
            "split": split,
            "images": len(images),
            # Keras uses the same limits.
            "crossentropy": float(-np.log(of_label.clip(1e-7, 1)).mean()),
            "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        }

    def _recorded_origin(self) -> Origin:
        if self.origin is None:
            raise InputError(f"{self.path} does not record the data that it was trained on")
        return self.origin


def save(
    reference: str, path: str | Path, *, overwrite: bool = False, runs_directory: str = "runs"
) -> dict[str, Any]:
    """Writes the model of a run into one file.

    Args:
        reference: A run directory, its name, or "latest".
        path: Ends in `.keras`. The file has the whole model with its optimizer.
        overwrite: Replace an existing file.
        runs_directory: Folder of the run directories.

    Returns:
        Path, bytes, parameters and run.

    Raises:
        InputError: There is no such run, or the path has another suffix, exists, or cannot be
            written.
    """
    path = Path(path)
    expect(path.suffix == ".keras", "PATH", "a name that ends in .keras", path)
    expect(path.parent.is_dir(), "PATH", "an existing folder", path.parent)
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already: replace it with --overwrite")
    run = open_run(reference, runs_directory=runs_directory)
    model = restore(run, compiled=True)
    origin = Origin.of(run).model_dump_json().encode()
    size = len(origin)
    expect(size < 2**16, "configuration and class names", "a zip comment of 65535 bytes", size)

    def write(partial: Path) -> None:
        model.save(partial, overwrite=True)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.comment = origin

    with safety.explained(f"{path} cannot be written"):
        write_atomic(path, write)
    size = path.stat().st_size
    return {"path": str(path), "bytes": size, "parameters": model.count_params(), "run": run.name}


def load(path: str | Path, *, trust: bool = False) -> LoadedModel:
    """Loads a model of any format, after checking that loading it runs no other code.

    Args:
        path: A run directory, a `.keras` file, a SavedModel folder, a `.tflite` or `.onnx` file, or
            a folder of exported models.
        trust: Accept code in the file. Use this only if you trust its author.

    Raises:
        InputError: The path is missing, damaged, of an unknown format, or contains code.
        MissingError: The runtime of the format is not installed.
    """
    path = Path(path)
    if not os.path.lexists(path) and path.parent == Path():
        path = open_run(str(path)).path  # the name of a run, or "latest"
    expect(os.path.lexists(path), "load", "a model", f"{path}: there is no such file or folder")
    if (path / "config.toml").is_file():
        run = open_run(str(path.absolute()))  # refuses a run that is not finished
        return _loaded(path, "run", restore(run), Origin.of(run), run.weights)
    if path.suffix == ".keras":
        return _loaded(path, "keras", *_load_keras(path, trust=trust), path)
    return _load_exported(path, trust=trust)


def _loaded(
    path: Path, kind: str, model: keras.Model, origin: Origin | None, file: Path
) -> LoadedModel:
    size = file.stat().st_size
    return LoadedModel(path, kind, model.count_params(), size, origin, of_keras(model))


def _load_keras(path: Path, *, trust: bool) -> tuple[keras.Model, Origin | None]:
    options = {"custom_objects": safety.check_keras(path, trust=trust), "safe_mode": not trust}
    with safety.explained(f"{path} cannot be loaded by Keras"):
        _check_weights(path)
        model = keras.saving.load_model(path, compile=False, **options)
        with zipfile.ZipFile(path) as archive:
            text = archive.comment
        return model, Origin.model_validate_json(text) if text else None


def _check_weights(path: Path) -> None:
    """Opens the weights of a .keras archive from a file: damaged in memory, they crash h5py."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        for name in archive.namelist():
            if name.endswith(".h5"):
                h5py.File(archive.extract(name, folder), "r").close()


def _load_exported(path: Path, *, trust: bool) -> LoadedModel:
    """Loads an exported model from its version folder, or a file or SavedModel without record."""
    if path.is_dir() and not (path / "saved_model.pb").is_file():
        path = find_version(path)
    folder = path if path.is_dir() else path.parent
    kind = "saved_model" if path.is_dir() else _KINDS.get(path.suffix)
    record = read_record(folder)
    if record is not None and path in (folder, folder / find_format(record.format).file):
        path, kind = folder / find_format(record.format).file, record.format
    else:
        record = None  # of another file in this folder
    if kind is None:
        raise InputError(
            f"{path}: expected a run, a SavedModel, or a .keras, .tflite or .onnx file; "
            "weights alone have no network, and .h5 models and pickles can contain code"
        )
    find_format(kind)  # its packages are installed
    if path.is_dir():
        safety.check_saved_model(path, trust=trust)
    with safety.explained(f"{path} cannot be read as {kind}"):
        predict = RUNTIMES[kind][1](path)
    size = sum(file.stat().st_size for file in artifact_files(path))
    parameters = None if record is None else record.parameters
    return LoadedModel(path, kind, parameters, size, record, predict)
