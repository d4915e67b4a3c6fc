"""Checks a model file before it is loaded, because loading a model can run code.

A `.keras` file may only name classes from the modules of Keras that build networks. Keras itself is
used in its safe mode, which still accepts functions of Keras that write files.

A SavedModel may only hold the operations of allowed_operations.txt: those of Keras layers, of
`keras.ops` and of this project's exports (scripts/allowed_operations.py explains the rule). All
others are refused, because TensorFlow does not record which of its 1,900 operations access files,
the network or Python. All functions of a graph are checked, called or not. So a call is harmless if
it calls a function of the same graph. The functions with which TensorFlow saves and restores
variables use four more operations. `tf.saved_model.load` never calls these functions: it reads the
variables itself.
"""

import itertools
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer import keras_objects
from trainer.errors import InputError

_MAX_CONFIG_BYTES = 10**8  # of the unpacked config.json; Keras checks the other files
# Without names that contain a dot, which Keras would look up in another module.
_KERAS_CLASSES = re.compile(
    r"(keras(\.(layers|models|initializers|regularizers|constraints|activations|losses|metrics"
    r"|optimizers|optimizers\.schedules|random))?|keras\.src\.models\.(functional|sequential)):\w+"
    # Networks of keras.applications:
    r"|keras\.src\.applications\.(convnext:LayerScale|inception_resnet_v2:CustomScaleLayer)"
    r"|keras\.src\.ops\.numpy:(Add|Multiply)"
)
# In small letters: configurations may write names of layers so.
_CODE = {"lambda", "__lambda__", "function", "tfsmlayer", "torchmodulewrapper"}
_CODE |= {"jaxlayer", "flaxlayer"}
_LIST = Path(__file__).with_name("allowed_operations.txt").read_text(encoding="utf-8")
ALLOWED_OPERATIONS = {line for line in _LIST.splitlines() if not line.startswith("#")}
_SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
SAVER_OPERATIONS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
# Operations that make variables and tables. TensorFlow writes their names.
_NAMED = {"VarHandleOp", "HashTableV2", "MutableHashTableV2"}
_TRUST = "Loading may run any code: load it with --trust if you trust its author"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises any error of a library again as one line that starts with `what`."""
    try:
        yield
    except Exception as error:  # damaged files and converters raise many types
        raise InputError(f"{what}: {keras_objects.explain(error)}") from error


def check_keras(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Checks the classes of a .keras archive, and imports those outside Keras that trust accepts.

    Returns:
        The imported classes by name, for `custom_objects` of Keras.

    Raises:
        InputError: The archive is damaged, contains code, or a class cannot be imported.
    """
    with explained(f"{path} is not a .keras archive, or is damaged"):
        with zipfile.ZipFile(path) as archive, archive.open("config.json") as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES))
        # Keras does not read this with compile=False. It can name a user's own loss function.
        config.pop("compile_config", None)
        objects = [
            f"{value.get('module') or 'keras'}:{value['class_name']}"
            for value in _values(config)
            if isinstance(value, dict) and "class_name" in value
        ]
    imported = {}
    for each in objects:
        name = each.rpartition(":")[2]
        if not trust and (name.lower() in _CODE or not _KERAS_CLASSES.fullmatch(each)):
            raise InputError(f"{path} contains code: {each}. {_TRUST}")
        if not each.startswith("keras"):
            imported[name] = keras_objects.import_object(f"class of {path}", each)
    return imported


def _values(tree: Any) -> Iterator[Any]:
    """Yields a JSON value and all values in it."""
    yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        yield from _values(child)


def check_saved_model(path: Path, *, trust: bool = False) -> Any:
    """Checks the operations of a SavedModel without loading it. Returns its saved_model.pb.

    Raises:
        InputError: It is damaged, or has an operation that Keras networks do not need.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    with explained(f"{path} is not a SavedModel, or is damaged"):
        saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        forbidden = find_forbidden(saved)
    if forbidden is not None and not trust:
        raise InputError(f"{path} contains {forbidden}, which Keras networks do not need. {_TRUST}")
    return saved


def find_forbidden(saved: Any) -> str | None:
    """Returns a description of the first thing in a parsed SavedModel that needs trust, or None."""
    graph = saved.meta_graphs[0]
    # TensorFlow loads all other SavedModels as version 1 did: it runs the operations of the saver.
    if len(saved.meta_graphs) > 1 or not graph.HasField("object_graph_def"):
        return "a graph of TensorFlow 1"
    library = graph.graph_def.library.function
    functions = {function.signature.name for function in library}
    savers = set(filter(_SAVER.fullmatch, functions))
    # The object graph lists the functions that can be called after loading, or that loading calls.
    objects = graph.object_graph_def.SerializeToString()
    for name in savers:
        if name.encode() in objects:
            return f"a call of {name}"
    # The nodes outside functions call the saver. Loading does not run them.
    found = [_forbidden(graph.graph_def.node, "the graph", functions)]
    for function in library:
        name = function.signature.name
        known = functions - savers | (SAVER_OPERATIONS if name in savers else set())
        found.append(_forbidden(function.node_def, name, known))
    return next(itertools.chain(*found), None)


def _forbidden(nodes: Any, where: str, functions: set[str]) -> Iterator[str]:
    """Yields a description of each node that needs trust."""
    for node in nodes:
        operation = f"the operation {node.op} (in {where})"
        if node.op not in functions and node.op not in ALLOWED_OPERATIONS:
            yield operation
        for name, value in sorted(node.attr.items()):
            # Control flow runs an operation if an attribute names it in the place of a function.
            # The caller of a function chooses its placeholders.
            called = {each.name for each in (value.func, *value.list.func)} - functions - {""}
            # These names would find the resources of other models in the process.
            shares = name == "container" or (name == "shared_name" and node.op not in _NAMED)
            if called or value.HasField("placeholder") or (shares and value.s):
                yield f"{operation} with {name} = {str(value).strip()}"
