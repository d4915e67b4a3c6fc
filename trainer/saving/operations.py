"""Finds the operations in the graph of a SavedModel that need trust.

allowed_operations.txt lists the operations of Keras layers, of `keras.ops` and of this project's
exports. scripts/allowed_operations.py writes it and explains the rule. All other operations are
refused, because TensorFlow does not record which of its 1,900 operations access files, the network
or Python, and because each version adds some.

All functions of a graph are checked, called or not. So a call is harmless if it calls a function of
the same graph. The functions with which TensorFlow saves and restores variables use four more
operations. `tf.saved_model.load` never calls these functions: it reads the variables itself.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
SAVER_OPERATIONS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
# Operations that make variables and tables. TensorFlow writes their names.
_NAMED = {"VarHandleOp", "HashTableV2", "MutableHashTableV2"}


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
    for name in sorted(savers & _callable_functions(graph.object_graph_def)):
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


def _callable_functions(objects: Any) -> set[str]:
    """Returns the functions that can be called after loading, or that loading calls."""
    found = set(objects.concrete_functions)
    for node in objects.nodes:
        found.update(node.function.concrete_functions)
        found.add(node.bare_concrete_function.concrete_function_name)
        found.add(node.captured_tensor.concrete_function)
    return found


def _used_nodes(graph: Any) -> set[str]:
    """Returns the nodes whose results another node, a signature or a collection uses."""
    names = [name for node in graph.graph_def.node for name in node.input]
    for signature in graph.signature_def.values():
        names += [tensor.name for tensor in signature.outputs.values()]
    for collection in graph.collection_def.values():
        names += collection.node_list.value
    return {name.lstrip("^").split(":")[0] for name in names}
