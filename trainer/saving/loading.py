"""Loads a model whatever its format: a run, a Keras file, a SavedModel, LiteRT or ONNX."""

from collections.abc import Callable
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
from trainer.saving.export import artefact_files, find_version, read_facts
from trainer.saving.files import Origin, origin_of
from trainer.saving.formats import FORMATS
from trainer.saving.runtimes import predict_in_batches
from trainer.training.checkpoint import load_weights

_BATCH = 256


@dataclass(frozen=True)
class Loaded:
    """A model, callable on raw images.

    Attributes:
        path: Where it lies.
        kind: "run", "keras", "weights" or a format of `trainer export`.
        parameters: How many it has; None where the format does not say.
        bytes: Size of its files.
        origin: Where it came from; None where it does not say.
    """

    path: Path
    kind: str
    parameters: int | None
    bytes: int
    origin: Origin | None
    _predict: Callable[[Any], Any] = field(repr=False)

    def __call__(self, images: Images) -> NDArray[np.float32]:
        """Returns the probabilities of images.

        Args:
            images: uint8 [n, height, width, channels], 0 to 255.

        Returns:
            float32 [n, classes].
        """
        if not len(images):
            raise InputError("expected at least one image, received none")
        answers: NDArray[np.float32] = predict_in_batches(self._predict, images, _BATCH)
        return answers

    def facts(self) -> dict[str, Any]:
        """Returns what it is, takes and gives, in plain values."""
        spec = None if self.origin is None else self.origin.spec
        return {
            "path": str(self.path),
            "kind": self.kind,
            "input": None if spec is None else f"images uint8 {[None, *spec.image_shape]}",
            "output": None if spec is None else f"probabilities float32 {[None, spec.class_count]}",
            "classes": None if spec is None else list(spec.class_names),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "run": None if self.origin is None else self.origin.run,
            "data": None if spec is None else spec.name,
        }

    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Scores the images of a split of the data it was trained on.

        Args:
            split: "train", "validation" or "test".

        Returns:
            Split, number of images, mean cross-entropy and accuracy.

        Raises:
            InputError: It does not say what it was trained on, or that is not to be had.
        """
        if self.origin is None:
            raise InputError(f"{self.path} does not say which data it was trained on")
        data = datasets.load(self.origin.config.data)
        if data.spec.fingerprint != self.origin.spec.fingerprint:
            raise InputError(f"the data is not what {self.path} was trained on: {data.spec.origin}")
        scored, right, loss = data.split(split), 0, 0.0
        for first in range(0, len(scored), _BATCH):
            images, labels = scored.read(slice(first, first + _BATCH))
            answers = self(images)
            right += int((answers.argmax(axis=1) == labels).sum())
            chosen = answers[np.arange(len(labels)), labels].astype(np.float64)
            loss -= float(np.log(np.clip(chosen, 1e-7, 1)).sum())  # as Keras clips
        count = len(scored)
        return {
            "path": str(self.path),
            "kind": self.kind,
            "data": data.spec.name,
            "split": split,
            "images": count,
            "crossentropy": loss / count,  # whatever loss it was trained by
            "accuracy": right / count,
        }


def load(path: str | Path, *, trust: bool = False) -> Loaded:
    """Loads a model of any format, after looking at what it would run.

    Args:
        path: A run directory, a `.keras` or `.weights.h5` file, a SavedModel folder, a `.tflite` or
            `.onnx` file, or a folder of exported models.
        trust: Run code that the file holds. Only for files whose maker you know.

    Raises:
        InputError: There is nothing, it is damaged, of no known format, or holds code.
        MissingError: The format's runtime is not installed.
    """
    path = Path(path)
    try:
        if not path.exists() and path.parent == Path():
            path = open_run(str(path)).path  # the name of a run, or "latest"
        kind = _identify(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if kind == "run":
        return _load_run(path)
    if kind == "keras":
        return _load_keras(path, trust=trust)
    if kind == "weights":
        return _load_weights(path, trust=trust)
    return _load_exported(path, kind, trust=trust)


def _identify(path: Path) -> str:
    """Says what a path holds, by its content; a name that says otherwise is refused."""
    if path.is_dir():
        if (path / "config.toml").is_file():
            return "run"
        return "saved_model" if (path / "saved_model.pb").is_file() else "exported"
    if not path.is_file():
        raise InputError(f"expected a model, received {path}: there is no such file or folder")
    with path.open("rb") as file:
        head = file.read(8)
    if head[:1] == b"\x80" or head[:2] == b"c_":
        raise InputError(f"{path} looks like a pickle, which can run anything: refused")
    found, ending = "onnx", ".onnx"  # a protocol buffer: it begins with no mark of its own
    if head.startswith(b"PK"):
        found, ending = "keras", ".keras"
    elif head.startswith(b"\x89HDF"):
        found, ending = "weights", ".weights.h5"
    elif head[4:8] == b"TFL3":
        found, ending = "litert", ".tflite"
    if not path.name.endswith(ending):
        known = "a run, .keras, .weights.h5, SavedModel, .tflite or .onnx"
        what = "of no known format" if found == "onnx" else f"a {ending} file by its content"
        legacy = "; legacy .h5 models are not loaded, as they can hold code"
        raise InputError(
            f"{path} is {what}, not by its name: expected {known}"
            + (legacy if found == "weights" else "")
        )
    return found


def _load_run(path: Path) -> Loaded:
    run = Run(path)
    if not run.finished:
        resume = shell_command("fit", "--resume", path)
        raise InputError(f"run {run.name} is not finished: go on with `{resume}`")
    return _of_keras(path, "run", restore(run), run.weights.stat().st_size, Origin.of(run))


def _load_keras(path: Path, *, trust: bool) -> Loaded:
    safety.check_keras(path, trust=trust)
    own = safety.imported(path) if trust else None
    try:
        model = keras.saving.load_model(
            path, custom_objects=own, compile=False, safe_mode=not trust
        )
    except Exception as error:
        # What a damaged file makes Keras raise is of many kinds.
        reason = keras_objects.explain(error)
        raise InputError(f"{path} cannot be loaded by Keras: {reason}") from error
    return _of_keras(path, "keras", model, path.stat().st_size, origin_of(path))


def _load_weights(path: Path, *, trust: bool) -> Loaded:
    safety.check_hdf5(path, path, path.stat().st_size)
    origin = origin_of(path) or _origin_of_run(path)
    if origin is None:
        raise InputError(
            f"{path} does not say which network it is for: expected a file made by `trainer save`, "
            "or one within its run directory"
        )
    safety.check_network(path, origin.config.model.options, trust=trust)
    with devices.dtype_policy(origin.config.training.precision):
        model = models.build(origin.config.model, origin.spec)
    load_weights(path, model)
    return _of_keras(path, "weights", model, path.stat().st_size, origin)


def _origin_of_run(path: Path) -> Origin | None:
    """Returns the origin of weights that lie in the checkpoints of a finished run."""
    run = Run(path.absolute().parent.parent)
    if not run.finished or path.absolute().parent != run.checkpoints:
        return None
    return Origin.of(run)


def _of_keras(
    path: Path, kind: str, model: keras.Model, size: int, origin: Origin | None
) -> Loaded:
    def predict(images: Any) -> Any:
        return model(images, training=False).numpy()

    return Loaded(path, kind, model.count_params(), size, origin, predict)


def _load_exported(path: Path, kind: str, *, trust: bool) -> Loaded:
    """Loads an artefact, alone or within the folder of its version."""
    if kind == "exported":
        path = find_version(path)
        kind = read_facts(path).format
        path = path / FORMATS[kind].file
    folder = path if path.is_dir() else path.parent
    exported = read_facts(folder) if (folder / "export.json").is_file() else None
    if path.is_dir():
        safety.check_saved_model(path, trust=trust)
    if kind == "onnx":
        FORMATS[kind].require()
        safety.check_onnx(path)
    predict = FORMATS[kind].open(path)
    size = sum((folder / name).stat().st_size for name in artefact_files(folder, path))
    if exported is None:
        return Loaded(path, kind, None, size, None, predict)
    origin = Origin(run=exported.run, config=exported.config, spec=exported.spec)
    return Loaded(path, exported.format, exported.parameters, size, origin, predict)
