"""Loads a model of any format: a run, a Keras file, a SavedModel, LiteRT or ONNX."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainer import data as datasets
from trainer import devices, keras_objects, models
from trainer.data import Images
from trainer.errors import InputError, shell_command
from trainer.experiment import restore
from trainer.run import Run, open_run
from trainer.saving import safety
from trainer.saving.files import Origin, read_origin
from trainer.saving.formats import find_format
from trainer.saving.runtimes import Predict, of_keras, predict_in_batches
from trainer.saving.versions import RECORD, artefact_files, find_version, read_record
from trainer.training.weights import load_weights

# Files are identified by their content: position, bytes, kind, and the expected suffix.
_MAGIC = (
    (0, b"PK", "keras", ".keras"),
    (0, b"\x89HDF", "weights", ".weights.h5"),
    (4, b"TFL3", "litert", ".tflite"),
    (0, b"", "onnx", ".onnx"),  # a protocol buffer, without bytes that identify it
)


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
        """Scores a split of the data that the model was trained on.

        Args:
            split: "train", "validation" or "test".

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
    if kind == "run":
        run = Run(path)
        if not run.finished:
            resume = shell_command("fit", "--resume", path)
            raise InputError(f"run {run.name} is not finished: continue it with `{resume}`")
        return _loaded(path, kind, restore(run), Origin.of(run), run.weights)
    if kind == "keras":
        return _load_keras(path, trust=trust)
    if kind == "weights":
        return _load_weights(path, trust=trust)
    return _load_exported(path, kind, trust=trust)


def _loaded(
    path: Path, kind: str, model: keras.Model, origin: Origin | None, file: Path
) -> LoadedModel:
    size = file.stat().st_size
    return LoadedModel(path, kind, model.count_params(), size, origin, of_keras(model))


def _identify(path: Path) -> str:
    """Returns the kind of a path by its content. A file name with another suffix is refused."""
    if path.is_dir():
        if (path / "config.toml").is_file():
            return "run"
        return "saved_model" if (path / "saved_model.pb").is_file() else "exported"
    if not path.is_file():
        raise InputError(f"expected a model, received {path}: there is no such file or folder")
    with path.open("rb") as file:
        head = file.read(8)
    if head[:1] == b"\x80" or head[:2] == b"c_":
        raise InputError(f"{path} looks like a pickle, which can run code: it is never loaded")
    kind, suffix = next(m[2:] for m in _MAGIC if head[m[0] :].startswith(m[1]))
    if not path.name.endswith(suffix):
        content = "an unknown format" if kind == "onnx" else f"the content of a {suffix} file"
        legacy = "; legacy .h5 models are not loaded, because they can contain code"
        raise InputError(
            f"{path} has {content}: expected a run, .keras, .weights.h5, SavedModel, .tflite or "
            f".onnx with that suffix{legacy if kind == 'weights' else ''}"
        )
    return kind


def _load_keras(path: Path, *, trust: bool) -> LoadedModel:
    classes = safety.check_keras(path, trust=trust)
    try:
        model = keras.saving.load_model(
            path, custom_objects=classes, compile=False, safe_mode=not trust
        )
    except Exception as error:  # a damaged file raises many types
        reason = keras_objects.explain(error)
        raise InputError(f"{path} cannot be loaded by Keras: {reason}") from error
    return _loaded(path, "keras", model, read_origin(path), path)


def _load_weights(path: Path, *, trust: bool) -> LoadedModel:
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
    return _loaded(path, "weights", model, origin, path)


def _load_exported(path: Path, kind: str, *, trust: bool) -> LoadedModel:
    """Loads an exported model from its version folder, or a file or SavedModel without record."""
    if kind == "exported":
        path = find_version(path)
        kind = read_record(path).format
        path = path / find_format(kind).file
    folder = path if path.is_dir() else path.parent
    record = read_record(folder) if (folder / RECORD).is_file() else None
    if path.is_dir():
        safety.check_saved_model(path, trust=trust)
    predict = find_format(kind).open(path)
    size = sum(file.stat().st_size for file in artefact_files(path))
    if record is None:
        return LoadedModel(path, kind, None, size, None, predict)
    return LoadedModel(path, record.format, record.parameters, size, record, predict)
