"""The versions of an exported model, loaded as they are published."""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.json_format import MessageToDict
from tensorflow.core.protobuf import saved_model_pb2

from trainer import keras_objects
from trainer.errors import InputError, TrainerError
from trainer.saving.export import check_sums, is_version, read_facts, versions
from trainer.saving.safety import check_saved_model
from trainer.serving.messages import Inputs, Tensors

_logger = logging.getLogger(__name__)


class Servable:
    """One version, ready to answer.

    Attributes:
        version: Its number.
        signatures: The inputs of each function.
        class_names: Of the data it was trained on; empty where the folder does not say.
    """

    def __init__(self, folder: Path, *, trust: bool) -> None:
        """Checks and loads a version, and calls each function once: first calls are slow.

        Args:
            folder: Of the version.
            trust: Accept any operation.

        Raises:
            InputError: It is damaged, no SavedModel, or holds what is not trusted.
            CheckError: A file is not as it was exported.
        """
        self.version = int(folder.name)
        self.class_names: tuple[str, ...] = ()
        if (folder / "export.json").is_file():
            facts = read_facts(folder)
            check_sums(folder, facts)
            self.class_names = facts.spec.class_names
        check_saved_model(folder, trust=trust)
        try:
            self._loaded = tf.saved_model.load(str(folder))
            self._metadata = _signature_definitions(folder)
            self._functions = dict(self._loaded.signatures)
            self.signatures: dict[str, Inputs] = {
                name: function.structured_input_signature[1]
                for name, function in self._functions.items()
            }
            self._warm_up()
        except Exception as error:
            # What a damaged SavedModel makes TensorFlow raise is of many kinds.
            reason = keras_objects.explain(error)
            raise InputError(f"{folder} cannot be served: {reason}") from error

    def run(self, signature: str, tensors: Tensors) -> Tensors:
        """Calls a function.

        Args:
            signature: Its name.
            tensors: As `signatures` describes them.

        Returns:
            Its outputs by name.
        """
        given = {name: tf.constant(array) for name, array in tensors.items()}
        outputs = self._functions[signature](**given)
        return {name: outputs[name].numpy() for name in sorted(outputs)}

    def metadata(self, name: str) -> dict[str, Any]:
        """Returns what `/metadata` answers: the signatures, in the words of the protocol."""
        spec = {"name": name, "signature_name": "", "version": str(self.version)}
        return {
            "model_spec": spec,
            "metadata": {"signature_def": {"signature_def": self._metadata}},
        }

    def _warm_up(self) -> None:
        for signature, inputs in self.signatures.items():
            if all(spec.dtype != tf.string and spec.shape.rank for spec in inputs.values()):
                zeros = {
                    name: np.zeros(
                        [n or 1 for n in spec.shape.as_list()], spec.dtype.as_numpy_dtype
                    )
                    for name, spec in inputs.items()
                }
                self.run(signature, zeros)


@dataclass(frozen=True)
class _Tried:
    """A version as it was last tried: its files then, and what came of it."""

    stamp: object
    servable: Servable | None
    fault: str = ""


class Servables:
    """The versions of one model.

    The newest is loaded when it is published and serves from then on; an older one when it is first
    asked for. A version that cannot be served is said once, and the one before goes on; it is tried
    again when its files have changed, as is one that was replaced under the same number.
    """

    def __init__(self, name: str, folder: Path, *, trust: bool = False) -> None:
        """Loads the newest version that can be served.

        Args:
            name: By which it is served.
            folder: Holds a folder for each version, named by its number; or one version, which is
                then the only one.
            trust: Accept any operation.

        Raises:
            InputError: None can be served.
        """
        self.name = name
        self._folder = folder
        self._trust = trust
        self._tried: dict[int, _Tried] = {}
        self._lock = threading.Lock()  # nothing is loaded twice at a time
        newest = self._newest_that_serves()
        if newest is None:
            faults = {tried.fault for tried in self._tried.values()}
            raise InputError("; ".join(sorted(faults)) or f"there is no version in {folder}")
        self.newest = newest

    def find(self, version: int | None) -> Servable | None:
        """Returns a version, loading it where need be; None where there is none to serve.

        Args:
            version: Its number; None for the newest.
        """
        if version is None or version == self.newest.version:
            return self.newest
        with self._lock:
            folder = self._versions().get(version)
            return None if folder is None else self._try(version, folder)

    def refresh(self) -> None:
        """Turns to the newest version that can be served, and lets go of what was removed."""
        with self._lock:
            newest = self._newest_that_serves()
            # Where nothing is left, the last one goes on.
            if newest is not None and newest is not self.newest:
                self.newest = newest
                _logger.info("%s: version %d serves from now on", self.name, newest.version)
            for version in self._tried.keys() - self._versions().keys():
                del self._tried[version]

    def status(self, version: int | None) -> list[dict[str, Any]]:
        """Returns the state of one version or of all, in the words of TensorFlow Serving.

        "AVAILABLE" is loaded, "START" is loaded when asked for, "END" cannot be served.
        """
        with self._lock:
            known = {*self._versions(), self.newest.version}
            return [
                self._state(number)
                for number in sorted(known, reverse=True)
                if version in (None, number)
            ]

    def _state(self, version: int) -> dict[str, Any]:
        state, code, message = "START", "OK", ""
        tried = self._tried.get(version)
        if version == self.newest.version or (tried is not None and tried.servable is not None):
            state = "AVAILABLE"
        elif tried is not None:
            state, code, message = "END", "FAILED_PRECONDITION", tried.fault
        status = {"error_code": code, "error_message": message}
        return {"version": str(version), "state": state, "status": status}

    def _versions(self) -> dict[int, Path]:
        """Returns the folders of the versions by number; none while the folder is unreadable."""
        try:
            if is_version(self._folder):
                return {int(self._folder.name): self._folder}
            return versions(self._folder)
        except OSError:
            return {}

    def _newest_that_serves(self) -> Servable | None:
        newest_first = sorted(self._versions().items(), reverse=True)
        tried = (self._try(version, folder) for version, folder in newest_first)
        return next(filter(None, tried), None)

    def _try(self, version: int, folder: Path) -> Servable | None:
        """Returns a version, loaded if its files are not those that were tried last."""
        stamp, tried = _stamp(folder), self._tried.get(version)
        if tried is not None and tried.stamp == stamp:
            return tried.servable
        try:
            self._tried[version] = _Tried(stamp, Servable(folder, trust=self._trust))
        except (TrainerError, OSError) as error:
            self._tried[version] = _Tried(stamp, None, str(error))
            _logger.warning("version %d is not served: %s", version, error)
        return self._tried[version].servable


def _stamp(folder: Path) -> object:
    """Returns what changes when a file below a folder does."""
    try:
        found = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
    except OSError:  # removed while it was looked at
        return None
    return [(name, stat.st_ino, stat.st_size, stat.st_ctime_ns) for name, stat in found]


def _signature_definitions(folder: Path) -> dict[str, Any]:
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return {
        name: MessageToDict(
            definition,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        for name, definition in saved.meta_graphs[0].signature_def.items()
    }
