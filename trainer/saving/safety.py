"""Checks a model file before it is loaded, because loading a model can run code.

Refused without trust: code (Lambda layers, functions, modules outside Keras), and operations that
Keras networks do not need. Always refused: paths outside an archive and archives that unpack to too
many bytes. Keras itself refuses weights in other files, and weights that declare more than 4 GiB
without storing them. ONNX Runtime refuses weights outside the folder of the model.

allowed_operations.txt lists the operations of Keras layers, of `keras.ops` and of this project's
exports. scripts/allowed_operations.py writes it and explains the rule. All other operations are
refused, because TensorFlow does not record which of its 1,900 operations access files, the network
or Python, and because each version adds some.

All functions of a graph are checked, called or not. So a call is harmless if it calls a function of
the same graph. The functions with which TensorFlow saves and restores variables use four more
operations. `tf.saved_model.load` never calls these functions: it reads the variables itself.
"""

import importlib
import json
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import InputError

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
_SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
SAVER_OPERATIONS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
# Operations that make variables and tables. TensorFlow writes their names.
_NAMED = {"VarHandleOp", "HashTableV2", "MutableHashTableV2"}
_TRUST = "If you trust its author, load it with --trust"


def check_keras(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Checks a .keras archive without loading it, and imports the classes that trust accepts.

    Returns:
        The imported classes by name, for `custom_objects` of Keras.

    Raises:
        InputError: The archive is damaged, contains code, or a class cannot be imported.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not _KERAS_FILES.fullmatch(name) or ".." in PurePosixPath(name).parts:
                    raise InputError(f"{path} contains {name!r}: not a file of .keras archives")
            size = sum(member.file_size for member in archive.infolist())
            if size > _MAX_ARCHIVE_BYTES:
                raise InputError(f"{path} unpacks to {size} bytes (at most {_MAX_ARCHIVE_BYTES})")
            config = json.loads(archive.read("config.json"))
            # Keras does not read this with compile=False. It can name a user's own loss function.
            config.pop("compile_config", None)
            objects = [
                (str(value.get("module") or "keras"), str(value["class_name"]))
                for value in _values(config)
                if isinstance(value, dict) and "class_name" in value
            ]
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
    """Checks the operations of a SavedModel without loading it. Returns its saved_model.pb.

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
    for option in _values(options):
        if isinstance(option, str) and (":" in option or option in _CODE):
            raise InputError(f"{path} contains code: {option}. Loading runs it. {_TRUST}")


def _values(tree: Any) -> Iterator[Any]:
    """Yields a JSON value and all values in it."""
    yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        yield from _values(child)


@cache
def allowed_operations() -> frozenset[str]:
    """Returns the names of the operations that need no trust."""
    text = Path(__file__).with_name("allowed_operations.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def find_forbidden(saved: Any) -> str | None:
    """Returns a description of the first thing in a parsed SavedModel that needs trust, or None."""
    graph = saved.meta_graphs[0]
    # TensorFlow loads all other SavedModels as version 1 did: it runs the operations of the saver.
    if len(saved.meta_graphs) > 1 or not graph.HasField("object_graph_def"):
        return "a graph of TensorFlow 1"
    return next(_forbidden(graph), None)


def _forbidden(graph: Any) -> Iterator[str]:
    """Yields a description of each thing in a graph that needs trust."""
    functions = {function.signature.name for function in graph.graph_def.library.function}
    savers = set(filter(_SAVER.fullmatch, functions))
    # The object graph lists the functions that can be called after loading, or that loading calls.
    objects = graph.object_graph_def.SerializeToString()
    for name in sorted(name for name in savers if name.encode() in objects):
        yield f"the function {name}, which only TensorFlow's own saver may call"
    saver_nodes = {graph.saver_def.save_tensor_name.split(":")[0], graph.saver_def.restore_op_name}
    saver_nodes -= _used_nodes(graph)
    for node in graph.graph_def.node:
        called = functions if node.name in saver_nodes else functions - savers
        yield from _forbidden_in_node(node, "the graph", called, allowed_operations())
    for function in graph.graph_def.library.function:
        name = function.signature.name
        allowed = allowed_operations() | (SAVER_OPERATIONS if name in savers else set())
        for node in function.node_def:
            yield from _forbidden_in_node(node, name, functions - savers, allowed)


def _forbidden_in_node(
    node: Any, where: str, functions: set[str], allowed: frozenset[str]
) -> Iterator[str]:
    operation = f"the operation {node.op} (in {where})"
    if node.op not in allowed | functions:
        yield operation
    for name, value in sorted(node.attr.items()):
        # Control flow runs an operation if an attribute names it in the place of a function.
        for called in (value.func, *value.list.func):
            if called.name and called.name not in functions:
                yield f"{operation} with {name} = {called.name!r}, which it may not call"
        if value.HasField("placeholder"):
            yield f"{operation} with {name} = ${value.placeholder}, which its caller chooses"
        # These names would find the resources of other models in the process.
        shares = name == "container" or (name == "shared_name" and node.op not in _NAMED)
        if shares and value.s:
            yield f"{operation} with {name} = {value.s.decode(errors='replace')!r}"


def _used_nodes(graph: Any) -> set[str]:
    """Returns the nodes whose results another node, a signature or a collection uses."""
    names = [name for node in graph.graph_def.node for name in node.input]
    for signature in graph.signature_def.values():
        names += [tensor.name for tensor in signature.outputs.values()]
    for collection in graph.collection_def.values():
        names += collection.node_list.value
    return {name.lstrip("^").split(":")[0] for name in names}
