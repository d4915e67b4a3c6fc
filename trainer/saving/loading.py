"""Loads a model of any format: a run, a Keras file, a SavedModel, LiteRT or ONNX."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainer import data as datasets
from trainer import devices, keras_objects, models
from trainer.data import Images
from trainer.errors import InputError
from trainer.experiment import restore
from trainer.prediction import predict_files
from trainer.run import Run, open_run
from trainer.saving import safety
from trainer.saving.files import Origin, read_origin
from trainer.saving.formats import find_format
from trainer.saving.runtimes import Predict, of_keras, predict_in_batches
from trainer.saving.versions import artefact_files, find_version, read_record
from trainer.training.weights import load_weights

_KINDS = {".keras": "keras", ".weights.h5": "weights", ".tflite": "litert", ".onnx": "onnx"}


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be called on raw images."""

    path: Path
    kind: str  # "run", "keras", "weights" or a format of `trainer export`
    parameters: int | None  # None: not recorded
    bytes: int  # size of its files
    origin: Origin | None  # None: not recorded
    _predict: Predict = field(repr=False)

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Returns probabilities, float32 [n, classes], of uint8 [n, height, width, channels]."""
        if not len(images):
            raise InputError("expected at least one image, received none")
        probabilities: NDArray[np.float32] = predict_in_batches(self._predict, images)
        return probabilities

    def predict(self, paths: Sequence[str | Path], **options: Any) -> list[dict[str, Any]]:
        """Predicts the class of image files; see `prediction.predict_files`.

        Raises:
            InputError: The data that it was trained on is not recorded.
        """
        if self.origin is None:
            raise InputError(f"{self.path} does not record the data that it was trained on")
        return predict_files(self, self.origin.spec, paths, **options)

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
        if self.origin is None:
            raise InputError(f"{self.path} does not record the data that it was trained on")
        data = datasets.load(self.origin.config.data)
        if data.spec.fingerprint != self.origin.spec.fingerprint:
            raise InputError(f"the data is not what {self.path} was trained on: {data.spec.origin}")
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


def load(path: str | Path, *, trust: bool = False) -> LoadedModel:
    """Loads a model of any format, after checking that loading it runs no other code.

    Args:
        path: A run directory, a `.keras` or `.weights.h5` file, a SavedModel folder, a `.tflite` or
            `.onnx` file, or a folder of exported models.
        trust: Accept code in the file. Use this only if you trust its author.

    Raises:
        InputError: The path is missing, damaged, of an unknown format, or contains code.
        MissingError: The runtime of the format is not installed.
    """
    path = Path(path)
    try:
        if not path.exists() and path.parent == Path():
            path = open_run(str(path)).path  # the name of a run, or "latest"
        kind = _identify(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if kind not in _KERAS_LOADERS:
        return _load_exported(path, kind, trust=trust)
    model, origin = _KERAS_LOADERS[kind](path, trust)
    size = (Run(path).weights if kind == "run" else path).stat().st_size
    return LoadedModel(path, kind, model.count_params(), size, origin, of_keras(model))


def _identify(path: Path) -> str:
    """Returns "run", "saved_model" for other folders, or the kind of a file by its suffix."""
    if path.is_dir():
        return "run" if (path / "config.toml").is_file() else "saved_model"
    if not path.is_file():
        raise InputError(f"expected a model, received {path}: there is no such file or folder")
    for suffix, kind in _KINDS.items():
        if path.name.endswith(suffix):
            return kind
    raise InputError(
        f"{path} has an unknown format: expected a run, a SavedModel, or a file that ends in "
        f"{', '.join(_KINDS)}; legacy .h5 models and pickles can contain code and are never loaded"
    )


def _load_run(path: Path, trust: bool) -> tuple[keras.Model, Origin]:  # noqa: ARG001
    run = open_run(str(path.absolute()))  # refuses a run that is not finished
    return restore(run), Origin.of(run)


def _load_keras(path: Path, trust: bool) -> tuple[keras.Model, Origin | None]:
    classes = safety.check_keras(path, trust=trust)
    try:
        model = keras.saving.load_model(
            path, custom_objects=classes, compile=False, safe_mode=not trust
        )
    except Exception as error:  # a damaged file raises many types
        reason = keras_objects.explain(error)
        raise InputError(f"{path} cannot be loaded by Keras: {reason}") from error
    return model, read_origin(path)


def _load_weights(path: Path, trust: bool) -> tuple[keras.Model, Origin]:
    try:
        origin = read_origin(path)
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path} is not a weights file, or is damaged: {error}") from None
    run = Run(path.absolute().parent.parent)
    if origin is None and run.finished and path.absolute().parent == run.checkpoints:
        origin = Origin.of(run)
    if origin is None:
        raise InputError(
            f"{path} does not record its network: expected a file made by `trainer save`, or one "
            "in a run directory"
        )
    if not trust:
        safety.check_network(path, origin.config.model.options)
    with devices.dtype_policy(origin.config.training.precision):
        model = models.build(origin.config.model, origin.spec)
    load_weights(path, model)
    return model, origin


_KERAS_LOADERS = {"run": _load_run, "keras": _load_keras, "weights": _load_weights}


def _load_exported(path: Path, kind: str, *, trust: bool) -> LoadedModel:
    """Loads an exported model from its version folder, or a file or SavedModel without record."""
    if kind == "saved_model" and not (path / "saved_model.pb").is_file():
        path = find_version(path)
    record = read_record(path if path.is_dir() else path.parent)
    if path.is_dir() and record is not None:
        kind = record.format
        path = path / find_format(kind).file
    if path.is_dir():
        safety.check_saved_model(path, trust=trust)
    predict = find_format(kind).open(path)
    size = sum(file.stat().st_size for file in artefact_files(path))
    kind, parameters = (record.format, record.parameters) if record else (kind, None)
    return LoadedModel(path, kind, parameters, size, record, predict)
