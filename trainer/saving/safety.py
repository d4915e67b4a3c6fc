"""Checks a model file before it is loaded, because loading a model can run code.

Refused without trust: code (Lambda layers, functions, modules outside Keras), and operations that
Keras networks do not need. Always refused: paths outside an archive and archives that unpack to too
many bytes. Keras itself refuses weights in other files, and weights that declare more than 4 GiB
without storing them. ONNX Runtime refuses weights outside the folder of the model.
"""

import importlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import InputError
from trainer.saving.operations import find_forbidden

_MAX_ARCHIVE_BYTES = 8 * 10**9  # unpacked size of a .keras archive
_KERAS_FILES = re.compile(r"metadata\.json|config\.json|model\.weights\.h5|assets/.+")
_KERAS_MODULES = re.compile(
    r"keras(\.(layers|models|initializers|regularizers|constraints|activations|losses|metrics"
    r"|optimizers|optimizers\.schedules|random))?|keras\.src\.models\.(functional|sequential)"
)
_CODE = {
    *("Lambda", "__lambda__", "function"),
    *("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"),
}
_TRUST = "If you trust its author, load it with --trust"


def check_keras(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Checks a .keras archive without loading it.

    Args:
        path: The archive.
        trust: Accept code, and import the classes that the archive names.

    Returns:
        The imported classes by name, for `custom_objects` of Keras.

    Raises:
        InputError: The archive is damaged, contains code, or a class cannot be imported.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist())
            config = json.loads(archive.read("config.json"))
            # Keras does not read this with compile=False. It can name a user's own loss function.
            config.pop("compile_config", None)
            objects = list(_objects(config))
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises many types
        raise InputError(f"{path} is not a .keras archive, or is damaged: {error}") from None
    imported = {}
    for module, name in objects:
        if not trust and (name in _CODE or not _KERAS_MODULES.fullmatch(module)):
            raise InputError(f"{path} contains code: {module}:{name}. Loading runs it. {_TRUST}")
        if not module.startswith("keras"):
            try:
                imported[name] = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise InputError(f"{path}: {module}:{name}: {error}") from None
    return imported


def check_saved_model(path: Path, *, trust: bool = False) -> Any:
    """Checks the operations of a SavedModel without loading it.

    Args:
        path: Its folder.
        trust: Accept any operation.

    Returns:
        The parsed saved_model.pb.

    Raises:
        InputError: It is damaged, or has an operation that Keras networks do not need.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((path / "saved_model.pb").read_bytes())
    except (OSError, DecodeError) as error:
        raise InputError(f"{path} is not a SavedModel, or is damaged: {error}") from None
    if not saved.meta_graphs:
        raise InputError(f"{path} is not a SavedModel: it contains no graph")
    forbidden = None if trust else find_forbidden(saved)
    if forbidden is not None:
        raise InputError(
            f"{path} contains {forbidden}: expected only operations of Keras networks, which "
            f"access no files, network or Python. {_TRUST}"
        )
    return saved


def check_network(path: Path, options: Any) -> None:
    """Checks the options of `[model]` in a weights file.

    Raises:
        InputError: An option names a class outside Keras, or one that runs code.
    """
    if isinstance(options, dict):
        options = list(options.values())
    if isinstance(options, list):
        for option in options:
            check_network(path, option)
    elif isinstance(options, str) and (":" in options or options in _CODE):
        raise InputError(f"{path} contains code: {options}. Loading runs it. {_TRUST}")


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for name in (member.filename for member in members):
        if not _KERAS_FILES.fullmatch(name) or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path} contains {name!r}: not a file of .keras archives")
    size = sum(member.file_size for member in members)
    if size > _MAX_ARCHIVE_BYTES:
        raise InputError(f"{path} unpacks to {size} bytes (at most {_MAX_ARCHIVE_BYTES})")


def _objects(tree: Any) -> Iterator[tuple[str, str]]:
    """Yields module and class of every object that a Keras configuration names."""
    if isinstance(tree, dict):
        if "class_name" in tree:
            yield str(tree.get("module") or "keras"), str(tree["class_name"])
        children: Any = tree.values()
    else:
        children = tree if isinstance(tree, list) else ()
    for child in children:
        yield from _objects(child)
