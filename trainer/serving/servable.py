"""Loads the versions of an exported model when they are published."""

import contextlib
import logging
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.json_format import MessageToDict

from trainer.errors import InputError
from trainer.images import read_image
from trainer.saving.safety import check_saved_model
from trainer.saving.versions import list_versions, read_record, verify_checksums
from trainer.serving.batching import Batcher
from trainer.serving.messages import Inputs, Tensors

_logger = logging.getLogger(__name__)


class Servable:
    """One loaded version.

    Attributes:
        name: Name of the model.
        version: Number of the version.
        signatures: The inputs of each function.
        batchers: They call the functions.
        metadata: The response of `/metadata` in the format of TensorFlow Serving, and the names of
            the classes, which the page needs.
    """

    def __init__(self, folder: Path, *, trust: bool) -> None:
        """Checks and loads a version. A damaged SavedModel raises many types of errors."""
        self.name, self.version = folder.parent.name, int(folder.name)
        record = read_record(folder)
        self._how = None if record is None else record.spec.preprocessing
        if record is not None:
            verify_checksums(folder, record)
        graph = check_saved_model(folder, trust=trust).meta_graphs[0]
        self._model = tf.saved_model.load(str(folder))
        self.signatures: dict[str, Inputs] = {}
        self.batchers: dict[str, Batcher] = {}
        for name, function in self._model.signatures.items():
            self._add_function(name, function.structured_input_signature[1])
        definitions = MessageToDict(
            type(graph)(signature_def=graph.signature_def),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )["signature_def"]
        class_names = record.spec.class_names if record else ()
        metadata = {"signature_def": {"signature_def": definitions}, "class_names": class_names}
        spec = {"name": self.name, "signature_name": "", "version": str(self.version)}
        self.metadata = {"model_spec": spec, "metadata": metadata}

    def _add_function(self, name: str, inputs: Inputs) -> None:
        """Prepares a function, and calls it once, because its first call is slow."""
        any_rows = all(spec.shape.rank and spec.shape[0] is None for spec in inputs.values())
        self.signatures[name] = inputs
        # Requests are joined only if the function accepts any number of rows.
        self.batchers[name] = Batcher(partial(self._run, name), max_rows=256 if any_rows else 0)
        if any_rows and all(spec.dtype != tf.string for spec in inputs.values()):
            shapes = {key: [size or 1 for size in spec.shape] for key, spec in inputs.items()}
            zeros = {key: np.zeros(shapes[key], inputs[key].dtype.as_numpy_dtype) for key in inputs}
            self._run(name, zeros)

    def _run(self, signature: str, tensors: Tensors) -> Tensors:
        """Returns the outputs of a function by name.

        Image files are read as `predict` reads them, which knows more formats than TensorFlow.
        """
        if signature == "serving_files" and self._how is not None:
            files = tensors["image_bytes"]
            images = [read_image(file, self._how, "image_bytes")[0] for file in files]
            signature, tensors = "serving_default", {"images": np.stack(images)}
        inputs = {name: tf.constant(array) for name, array in tensors.items()}
        outputs = self._model.signatures[signature](**inputs)
        return {name: outputs[name].numpy() for name in sorted(outputs)}


class Servables:
    """The versions of one model.

    The newest version is loaded when it is published. Older versions are loaded by their first
    request. If a version cannot be loaded, the error is logged once and the previous version keeps
    serving. A version is loaded again when its files change.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        """Loads the newest version that can be served.

        Args:
            folder: The folder of the model, or one version folder, to serve only that version.
            trust: Accept any operation.

        Raises:
            InputError: No version can be served.
        """
        self._folder, self._trust = folder, trust
        # By number: when each file was changed, and the version or why it cannot be served.
        self._loaded: dict[int, tuple[dict[Path, int], Servable | str]] = {}
        self._lock = threading.Lock()  # one thread loads at a time
        newest = self._load_newest()
        if newest is None:
            errors = [str(result) for _, result in self._loaded.values()]
            raise InputError("; ".join(errors) or f"there is no version in {folder}")
        self.newest = newest

    def find(self, version: int) -> Servable | None:
        """Returns a version. None: there is none, or it cannot be served."""
        if version == self.newest.version:
            return self.newest
        with self._lock:
            return self._load(version)

    def refresh(self) -> None:
        """Switches to the newest version that can be served, and drops removed versions."""
        with self._lock:
            # If all versions were removed, the last one keeps serving.
            newest = self._load_newest() or self.newest
            if newest is not self.newest:
                self.newest = newest
                _logger.info("%s: version %d is now served", newest.name, newest.version)
            for version in self._loaded.keys() - list_versions(self._folder).keys():
                del self._loaded[version]

    def status(self) -> list[dict[str, Any]]:
        """Returns the state of each version in the format of TensorFlow Serving.

        "AVAILABLE" is served, if necessary after loading. "END" cannot be served.
        """
        found = []
        for version in sorted({self.newest.version, *list_versions(self._folder)}, reverse=True):
            result = self._loaded.get(version, ({}, ""))[1]
            error = result if isinstance(result, str) else ""
            code, state = ("FAILED_PRECONDITION", "END") if error else ("OK", "AVAILABLE")
            status = {"error_code": code, "error_message": error}
            found.append({"version": str(version), "state": state, "status": status})
        return found

    def _load_newest(self) -> Servable | None:
        newest_first = sorted(list_versions(self._folder), reverse=True)
        return next(filter(None, map(self._load, newest_first)), None)

    def _load(self, version: int) -> Servable | None:
        """Returns a version, loaded anew if its files have changed since the last time."""
        folder = list_versions(self._folder).get(version)
        if folder is None:
            return None
        changed: dict[Path, int] = {}
        with contextlib.suppress(OSError):  # removed meanwhile
            changed = {path: path.stat().st_ctime_ns for path in folder.rglob("*")}
        if version not in self._loaded or self._loaded[version][0] != changed:
            try:
                self._loaded[version] = changed, Servable(folder, trust=self._trust)
            except Exception as error:
                message = f"version {version} is not served: {error}"
                self._loaded[version] = changed, message
                _logger.warning(message)
        result = self._loaded[version][1]
        return result if isinstance(result, Servable) else None
