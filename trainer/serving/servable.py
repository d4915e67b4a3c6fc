"""Loads the versions of an exported model when they are published."""

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.json_format import MessageToDict

from trainer.errors import InputError
from trainer.images import Images
from trainer.saving.safety import check_saved_model
from trainer.saving.versions import list_versions, read_record, verify_checksums
from trainer.serving.batching import Batcher
from trainer.serving.messages import Tensors

_logger = logging.getLogger(__name__)


class Servable:
    """One loaded version.

    Attributes:
        name: Name of the model.
        version: Number of the version.
        spec: The data that it was trained on.
        batcher: Predicts images.
        metadata: The response of `/metadata` in the format of TensorFlow Serving, and the names of
            the classes, which the page needs.
    """

    def __init__(self, folder: Path, *, trust: bool) -> None:
        """Checks and loads a version. A damaged SavedModel raises many types of errors."""
        self.name, self.version = folder.parent.name, int(folder.name)
        graph = check_saved_model(folder, trust=trust).meta_graphs[0]
        record = read_record(folder)
        if record is None:
            raise InputError(f"{folder}: expected an export of this project, with export.json")
        verify_checksums(folder, record)
        self.spec = record.spec
        self._model = tf.saved_model.load(str(folder))
        self._run(np.zeros((1, *self.spec.image_shape), np.uint8))  # the first call is slow
        self.batcher = Batcher(self._run)
        definitions = MessageToDict(
            type(graph)(signature_def=graph.signature_def),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        metadata = {"signature_def": definitions, "class_names": self.spec.class_names}
        spec = {"name": self.name, "signature_name": "", "version": str(self.version)}
        self.metadata = {"model_spec": spec, "metadata": metadata}

    def _run(self, images: Images) -> Tensors:
        """Returns the outputs by name."""
        outputs = self._model.signatures["serving_default"](images=tf.constant(images))
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
