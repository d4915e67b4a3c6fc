"""Which operations the graph of a SavedModel may hold without trust.

allowed_operations.txt lists the operations that Keras layers, functions of `keras.ops` and this
project's exports consist of. scripts/allowed_operations.py writes it and explains the rule.
Everything else is refused, because TensorFlow does not record which of its 1,900 operations reach
files, the network or Python, and because each version adds some.

All functions of a graph are checked, called or not. So a call is harmless if it calls a function of
the same graph. TensorFlow's own functions that save and restore the variables of a SavedModel use
four more operations. `tf.saved_model.load` never calls them: it reads the variables by itself.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
SAVER_OPERATIONS = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}
# Operations that make variables and tables, whose names TensorFlow writes.
_NAMED = {"VarHandleOp", "HashTableV2", "MutableHashTableV2"}


@cache
def allowed_operations() -> frozenset[str]:
    """Returns the names of the operations that need no trust."""
    text = Path(__file__).with_name("allowed_operations.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def find_forbidden(saved: Any) -> str | None:
    """Returns the first thing in a SavedModel that needs trust, in words; None if there is none.

    Args:
        saved: The parsed SavedModel, with at least one graph.
    """
    graph = saved.meta_graphs[0]
    # TensorFlow loads any other SavedModel as version 1 did: it runs whatever the saver names.
    if len(saved.meta_graphs) > 1 or not graph.HasField("object_graph_def"):
        return "a graph of TensorFlow 1"
    return next(_forbidden(graph), None)


def _forbidden(graph: Any) -> Iterator[str]:
    """Yields each thing in a graph that needs trust, in words."""
    functions = {function.signature.name for function in graph.graph_def.library.function}
    savers = set(filter(_SAVER.fullmatch, functions))
    for name in sorted(savers & _functions_of_objects(graph.object_graph_def)):
        yield f"the function {name}, which only TensorFlow's own saver may call"
    saver_nodes = {graph.saver_def.save_tensor_name.split(":")[0], graph.saver_def.restore_op_name}
    saver_nodes -= _read_nodes(graph)
    for node in graph.graph_def.node:
        callable_ = functions if node.name in saver_nodes else functions - savers
        yield from _forbidden_in_node(node, "the graph", callable_, allowed_operations())
    for function in graph.graph_def.library.function:
        name = function.signature.name
        allowed = allowed_operations()
        allowed |= SAVER_OPERATIONS if name in savers else frozenset()
        for node in function.node_def:
            yield from _forbidden_in_node(node, name, functions - savers, allowed)


def _forbidden_in_node(
    node: Any, where: str, functions: set[str], allowed: frozenset[str]
) -> Iterator[str]:
    operation = f"the operation {node.op} (in {where})"
    if node.op not in allowed | functions:
        yield operation
    for name, value in sorted(node.attr.items()):
        # Control flow also runs an operation whose name it gets in place of a function.
        for called in (value.func, *value.list.func):
            if called.name and called.name not in functions:
                yield f"{operation} with {name} = {called.name!r}, which it may not call"
        if value.HasField("placeholder"):
            yield f"{operation} with {name} = ${value.placeholder}, which its caller chooses"
        # Resources of other models in the process are found by these names.
        shares = name == "container" or (name == "shared_name" and node.op not in _NAMED)
        if shares and value.s:
            yield f"{operation} with {name} = {value.s.decode(errors='replace')!r}"


def _functions_of_objects(objects: Any) -> set[str]:
    """Returns the functions that loading a SavedModel makes callable or calls."""
    found = set(objects.concrete_functions)
    for node in objects.nodes:
        found |= {*node.function.concrete_functions}
        found |= {node.bare_concrete_function.concrete_function_name}
        found |= {node.captured_tensor.concrete_function}
    return found


def _read_nodes(graph: Any) -> set[str]:
    """Returns the nodes whose results another node, a signature or a collection uses."""
    inputs = [name for node in graph.graph_def.node for name in node.input]
    outputs = [
        tensor.name
        for signature in graph.signature_def.values()
        for tensor in signature.outputs.values()
    ]
    collected = [name for each in graph.collection_def.values() for name in each.node_list.value]
    return {name.lstrip("^").split(":")[0] for name in (*inputs, *outputs, *collected)}
