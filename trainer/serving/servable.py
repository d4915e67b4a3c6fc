"""Loads the versions of an exported model when they are published."""

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.json_format import MessageToDict

from trainer import keras_objects
from trainer.errors import InputError, TrainerError
from trainer.saving.safety import check_saved_model
from trainer.saving.versions import list_versions, read_record, verify_checksums
from trainer.serving.messages import Inputs, Tensors

_logger = logging.getLogger(__name__)


class Servable:
    """One loaded version.

    Attributes:
        version: Its number.
        signatures: The inputs of each function.
    """

    def __init__(self, folder: Path, *, trust: bool) -> None:
        """Checks and loads a version, and calls each function once, because first calls are slow.

        Raises:
            InputError: It is damaged, not a SavedModel, or needs trust.
            CheckError: A file differs from its checksum.
        """
        self.version = int(folder.name)
        self._record = read_record(folder)
        if self._record is not None:
            verify_checksums(folder, self._record)
        self._graph = check_saved_model(folder, trust=trust).meta_graphs[0]
        try:
            self._model = tf.saved_model.load(str(folder))
            self.signatures: dict[str, Inputs] = {
                name: function.structured_input_signature[1]
                for name, function in self._model.signatures.items()
            }
            for signature, inputs in self.signatures.items():
                if all(spec.dtype != tf.string and spec.shape.rank for spec in inputs.values()):
                    self.run(signature, {name: _zeros(spec) for name, spec in inputs.items()})
        except Exception as error:  # a damaged SavedModel raises many types
            reason = keras_objects.explain(error)
            raise InputError(f"{folder} cannot be served: {reason}") from error

    def run(self, signature: str, tensors: Tensors) -> Tensors:
        """Returns the outputs of a function by name. `signatures` describes its inputs."""
        inputs = {name: tf.constant(array) for name, array in tensors.items()}
        outputs = self._model.signatures[signature](**inputs)
        return {name: outputs[name].numpy() for name in sorted(outputs)}

    def metadata(self, name: str) -> dict[str, Any]:
        """Returns the response of `/metadata`.

        The format is that of TensorFlow Serving, except for `class_names`, which the page needs.
        """
        signatures = MessageToDict(
            type(self._graph)(signature_def=self._graph.signature_def),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )["signature_def"]
        return {
            "model_spec": {"name": name, "signature_name": "", "version": str(self.version)},
            "metadata": {
                "signature_def": {"signature_def": signatures},
                "class_names": self._record.spec.class_names if self._record else (),
            },
        }


class Servables:
    """The versions of one model.

    The newest version is loaded when it is published. Older versions are loaded by their first
    request. If a version cannot be loaded, the error is logged once and the previous version keeps
    serving. A version is loaded again when its files change.
    """

    def __init__(self, name: str, folder: Path, *, trust: bool = False) -> None:
        """Loads the newest version that can be served.

        Args:
            name: Name of the model in the addresses.
            folder: The folder of the model, or one version folder, to serve only that version.
            trust: Accept any operation.

        Raises:
            InputError: No version can be served.
        """
        self.name, self._folder, self._trust = name, folder, trust
        # By number: the state of the files when they were last loaded, and the result or the error.
        self._loaded: dict[int, tuple[object, Servable | str]] = {}
        self._lock = threading.Lock()  # one thread loads at a time
        newest = self._load_newest()
        if newest is None:
            errors = sorted({str(result) for _, result in self._loaded.values()})
            raise InputError("; ".join(errors) or f"there is no version in {folder}")
        self.newest = newest

    def find(self, version: int | None) -> Servable | None:
        """Returns a version or the newest. None: there is none, or it cannot be served."""
        if version is None or version == self.newest.version:
            return self.newest
        with self._lock:
            folder = list_versions(self._folder).get(version)
            return None if folder is None else self._load(version, folder)

    def refresh(self) -> None:
        """Switches to the newest version that can be served, and drops removed versions."""
        with self._lock:
            # If all versions were removed, the last one keeps serving.
            newest = self._load_newest() or self.newest
            if newest is not self.newest:
                self.newest = newest
                _logger.info("%s: version %d is now served", self.name, newest.version)
            for version in self._loaded.keys() - list_versions(self._folder).keys():
                del self._loaded[version]

    def status(self, version: int | None) -> list[dict[str, Any]]:
        """Returns the state of one version, or of all, in the format of TensorFlow Serving.

        "AVAILABLE" is loaded, "START" is loaded by its first request, "END" cannot be served.
        """
        with self._lock:
            results = {
                number: self._loaded.get(number, (None, None))[1]
                for number in list_versions(self._folder)
            }
            results[self.newest.version] = self.newest
        numbers = sorted(results, reverse=True) if version is None else results.keys() & {version}
        return [_status(number, results[number]) for number in numbers]

    def _load_newest(self) -> Servable | None:
        newest_first = sorted(list_versions(self._folder).items(), reverse=True)
        loaded = (self._load(version, folder) for version, folder in newest_first)
        return next(filter(None, loaded), None)

    def _load(self, version: int, folder: Path) -> Servable | None:
        """Returns a version, loaded anew if its files have changed since the last time."""
        files = _file_state(folder)
        if version not in self._loaded or self._loaded[version][0] != files:
            try:
                self._loaded[version] = files, Servable(folder, trust=self._trust)
            except (TrainerError, OSError) as error:
                self._loaded[version] = files, str(error)
                _logger.warning("version %d is not served: %s", version, error)
        result = self._loaded[version][1]
        return result if isinstance(result, Servable) else None


def _status(version: int, result: Servable | str | None) -> dict[str, Any]:
    failed = isinstance(result, str)
    state = "END" if failed else "START" if result is None else "AVAILABLE"
    code = "FAILED_PRECONDITION" if failed else "OK"
    status = {"error_code": code, "error_message": result if failed else ""}
    return {"version": str(version), "state": state, "status": status}


def _zeros(spec: tf.TensorSpec) -> np.ndarray:
    return np.zeros([size or 1 for size in spec.shape], spec.dtype.as_numpy_dtype)


def _file_state(folder: Path) -> object:
    """Returns a value that changes when a file in a folder changes."""
    with contextlib.suppress(OSError):  # removed meanwhile
        files = {path: path.stat() for path in folder.rglob("*")}
        return {path: (s.st_ino, s.st_size, s.st_ctime_ns) for path, s in files.items()}
    return None
