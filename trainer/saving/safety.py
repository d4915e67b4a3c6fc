"""What a model file may hold. Loading a model is running a program: these look before it is run.

Refused without trust: code (Lambda layers, functions, modules other than Keras's), and operations
that Keras networks do not need. Always refused: paths that leave an archive, files within files,
and sizes that the file itself cannot hold.
"""

import importlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import h5py

from trainer.errors import InputError
from trainer.saving.operations import find_forbidden

_MOST_BYTES = 8 * 10**9  # that a .keras archive may unpack to
_MOST_GRAPH_BYTES = 2 * 10**9  # of a graph, the most that its format can hold
_KERAS_FILES = re.compile(r"metadata\.json|config\.json|model\.weights\.h5|assets/.+")
_KERAS_MODULES = re.compile(
    r"keras(\.(layers|models|initializers|regularizers|constraints|activations|losses|metrics"
    r"|optimizers|optimizers\.schedules|random))?|keras\.src\.models\.(functional|sequential)"
)
_OWN = {
    ("trainer.training.fused_adam", "FusedAdam"),
    ("trainer.training.losses", "SmoothedCrossentropy"),
}
_CODE = {
    *("Lambda", "__lambda__", "function"),
    *("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"),
}


def check_keras(path: Path, *, trust: bool = False) -> None:
    """Looks into a .keras archive without loading it.

    Args:
        path: The archive.
        trust: Let it hold code.

    Raises:
        InputError: It is damaged, holds code, or is not what Keras writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist())
            config = _used(json.loads(archive.read("config.json")))
            weights = archive.read("model.weights.h5")
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RecursionError, EOFError) as error:
        raise InputError(f"{path} is no .keras archive, or is damaged: {error}") from None
    if not trust:
        for module, name in _objects(config):
            known = _KERAS_MODULES.fullmatch(module or "keras") or (module, name) in _OWN
            if name in _CODE or not known:
                raise InputError(
                    f"{path} holds code: {module or 'keras'}:{name}; loading it would run that. "
                    "If you know who made it, load it with --trust"
                )
    check_hdf5(path, io.BytesIO(weights), len(weights))


def check_hdf5(path: Path, file: Any, size: int) -> None:
    """Looks into a file of weights without reading any.

    Args:
        path: Of the file, or of the archive that holds it, for the message.
        file: A path or a file object.
        size: Bytes of the file.

    Raises:
        InputError: It is damaged, declares more than it holds, or refers to other files.
    """
    declared = 0
    try:
        with h5py.File(file, "r") as weights:
            for name, item in _hdf5_items(weights):
                if isinstance(item, h5py.ExternalLink):
                    raise InputError(f"{path}: {name} refers to another file: refused")
                if isinstance(item, h5py.Dataset):
                    if item.external or item.is_virtual:
                        raise InputError(
                            f"{path}: {name} keeps its values in another file: refused"
                        )
                    declared += item.nbytes
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds no weights, or is damaged: {reason}") from None
    if declared > size:
        raise InputError(
            f"{path} declares {declared} bytes of weights and has {size}: it is damaged, or made "
            "to exhaust the memory"
        )


def check_saved_model(path: Path, *, trust: bool = False) -> None:
    """Checks the operations of a SavedModel without loading it.

    Args:
        path: Its folder.
        trust: Accept any operation.

    Raises:
        InputError: It is damaged, or has an operation that Keras networks do not need.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        size = (path / "saved_model.pb").stat().st_size
        if size > _MOST_GRAPH_BYTES:
            raise InputError(f"{path}: a graph of {size} bytes; at most {_MOST_GRAPH_BYTES}")
        saved.ParseFromString((path / "saved_model.pb").read_bytes())
    except (OSError, DecodeError) as error:
        raise InputError(f"{path} is no SavedModel, or is damaged: {error}") from None
    if not saved.meta_graphs:
        raise InputError(f"{path} is no SavedModel: it holds no graph")
    if trust:
        return
    forbidden = find_forbidden(saved)
    if forbidden is not None:
        raise InputError(
            f"{path} holds {forbidden}: expected only operations of Keras networks, which reach no "
            "files, network or Python. If you know who made it, load it with --trust"
        )


def check_network(path: Path, options: Any, *, trust: bool = False) -> None:
    """Looks through the options of a network that a file brings along.

    Args:
        path: The file, for the message.
        options: Of `[model]`: tables, lists and values.
        trust: Let them name code.

    Raises:
        InputError: They name a class of a module that is not Keras's, or one that runs files.
    """
    if isinstance(options, dict):
        options = list(options.values())
    if isinstance(options, list):
        for option in options:
            check_network(path, option, trust=trust)
    elif isinstance(options, str) and not trust and (":" in options or options in _CODE):
        raise InputError(
            f"{path} holds code: {options}; loading it would run that. If you know who made it, "
            "load it with --trust"
        )


def check_onnx(path: Path) -> None:
    """Looks into an .onnx file for weights that it takes from other files.

    Raises:
        InputError: It is damaged, or refers to other files.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as onnx: {error}") from None
    outside = onnx.TensorProto.EXTERNAL
    if any(tensor.data_location == outside for tensor in model.graph.initializer):
        raise InputError(f"{path} keeps its weights in other files: refused")


def imported(path: Path) -> dict[str, Any]:
    """Imports the classes that a trusted .keras archive names, for Keras to find them.

    Raises:
        InputError: One cannot be imported.
    """
    with zipfile.ZipFile(path) as archive:
        config = _used(json.loads(archive.read("config.json")))
    found = {}
    for module, name in _objects(config):
        if module is not None and not module.startswith("keras"):
            try:
                found[name] = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise InputError(f"{path}: {module}:{name}: {error}") from None
    return found


def _used(config: Any) -> Any:
    """Returns the part of a Keras configuration that loading with `compile=False` reads.

    Loss, metrics and optimizer are left out: Keras writes a function of a user's own in a form that
    it cannot read.
    """
    if not isinstance(config, dict):
        return config
    return {key: value for key, value in config.items() if key != "compile_config"}


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        name = PurePosixPath(member.filename)
        if not _KERAS_FILES.fullmatch(member.filename) or ".." in name.parts or name.is_absolute():
            raise InputError(f"{path} holds {member.filename!r}, which no .keras archive has")
    unpacked = sum(member.file_size for member in members)
    if unpacked > _MOST_BYTES:
        raise InputError(f"{path} unpacks to {unpacked} bytes; at most {_MOST_BYTES} are read")


def _objects(tree: Any) -> Iterator[tuple[str | None, str]]:
    """Yields module and class of every object that a Keras configuration names."""
    if isinstance(tree, dict):
        if "class_name" in tree:
            module = tree.get("module")
            yield None if module is None else str(module), str(tree["class_name"])
        children: Any = tree.values()
    else:
        children = tree if isinstance(tree, list) else ()
    for child in children:
        yield from _objects(child)


def _hdf5_items(group: h5py.Group) -> Iterator[tuple[str, Any]]:
    """Yields every link and object below a group, without following links out of the file."""
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            yield name, link
            continue
        item = group[name]
        yield item.name, item
        if isinstance(item, h5py.Group):
            yield from _hdf5_items(item)
