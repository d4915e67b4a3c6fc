"""The kernel check: the operations of a graph that run on the CPU although a GPU trains.

It uses undocumented names of TensorFlow, as `tensorflow_internals` does. It is imported on first
use: on a GPU, and by `trainer doctor`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.framework import kernels  # no public function returns them

from trainer.errors import InputError
from trainer.keras_objects import nested_layers

# These have a GPU kernel, but it calls Python on the host.
_PYTHON_CALLS = {"EagerPyFunc", "PyFunc", "PyFuncStateless"}


@dataclass(frozen=True)
class HostOperation:
    """An operation that runs on the CPU although the step runs on another device."""

    operation: str  # TensorFlow's name, for example "GatherV2"
    types: str  # its data types, for example "Tparams: uint8, Tindices: int64"
    part: str  # the layer that contains it, "layer 'shift'"; else "the step"
    count: int  # number of such operations in the graph

    def __str__(self) -> str:
        """Returns one phrase for messages."""
        times = f" {self.count} times" if self.count > 1 else ""
        return f"{self.operation} in {self.part}{times} ({self.types or 'any type'})"


class KernelReport(NamedTuple):
    """The number of operations of a graph and its functions, and those without a GPU kernel."""

    operations: int
    host: tuple[HostOperation, ...]

    def __str__(self) -> str:
        """Returns the result in one line."""
        total = f"{self.operations:,} operations of the training step"
        if not self.host:
            return f"all {total} have a GPU kernel"
        count = sum(each.count for each in self.host)
        return f"{count} of the {total} run on the CPU: {'; '.join(map(str, self.host))}"


def check_kernels(
    graph: tf.Graph,
    device_type: str = "GPU",
    *,
    layers: Collection[str] = (),
    traced_on: Collection[str] = (),
) -> KernelReport:
    """Finds the operations of a graph and its functions that a device has no kernel for.

    TensorFlow runs these on the CPU without a message, and copies their inputs and outputs in every
    step. Its Linux package lists the kernels of all devices, so the check needs no GPU. Functions
    that XLA compiles are skipped.

    Args:
        graph: The graph of a traced function.
        device_type: "GPU", or another type that has registered kernels.
        layers: Names of the layers that operations may belong to.
        traced_on: The devices of a graph for several devices; any other CPU counts as the host.
    """
    nodes = list(_nodes(graph.as_graph_def()))
    missing = Counter(
        (node.op, _types(node), _part(node.name, layers))
        for node in nodes
        if not _runs_on(node, device_type, traced_on)
    )
    host = (HostOperation(*key, count) for key, count in sorted(missing.items()))
    return KernelReport(len(nodes), tuple(host))


def explain_xla_error(error: Exception, loop: Any) -> None:
    """Raises InputError if an error of a step means that XLA cannot compile an operation."""
    found = re.search(r"node [`{]*(\S+?)[`}]", text := str(error))
    if found and re.search("trying to compile|XLA", text):
        refused = f"{found[1].rpartition('/')[2]} in {_part(found[1], layer_names(loop))}"
        message = f"XLA cannot compile {refused}: set training.jit_compile = false"
        raise InputError(message) from error


def check_step(loop: Any, train: Any, device_type: str | None = None) -> KernelReport:
    """Checks the kernels of the training step of a `Loop`.

    Args:
        loop: The loop.
        train: Its training batches.
        device_type: As in `check_kernels`; None: that of the loop's devices.
    """
    names = loop.devices.names if loop.devices.replicas > 1 else ()
    graph, kind = loop.trace(train).graph, device_type or loop.devices.type
    return check_kernels(graph, kind, layers=layer_names(loop), traced_on=names)


def layer_names(loop: Any) -> list[str]:
    """Returns the names of the layers that operations of a training step may belong to."""
    layers = [*loop.model.layers, *getattr(loop.augment, "layers", [])]
    return [layer.name for layer in nested_layers(layers)]


def _nodes(graph: Any) -> Iterator[Any]:
    """Yields the nodes of a GraphDef and of the functions it calls, except compiled functions."""
    functions = {function.signature.name: function for function in graph.library.function}
    seen: set[str] = set()
    waiting: list[Any] = [graph.node]
    while waiting:
        for node in waiting.pop():
            compiled = node.attr["_XlaMustCompile"].b
            values = [] if compiled else node.attr.values()
            called = {node.op, *(value.func.name for value in values)}
            called.update(function.name for value in values for function in value.list.func)
            called = (called & functions.keys()) - seen
            waiting += [functions[name].node_def for name in sorted(called)]
            seen |= called
            if not compiled and node.op not in functions:
                yield node


def _runs_on(node: Any, device_type: str, traced_on: Collection[str]) -> bool:
    device = node.device.rpartition("/device:")[2]
    pinned = device.startswith("CPU") and device not in traced_on
    if device_type == "GPU" and (pinned or node.op in _PYTHON_CALLS):
        return False
    return any(
        kernel.device_type in (device_type, "DEFAULT")
        and kernel.label == node.attr["_kernel"].s.decode()
        and all(_allows(constraint, node) for constraint in kernel.constraint)
        for kernel in kernels.get_registered_kernels_for_op(node.op).kernel
    )


def _allows(constraint: Any, node: Any) -> bool:
    """Returns whether an attribute of a node meets the constraint of a kernel."""
    value, allowed = node.attr[constraint.name], constraint.allowed_values.list
    many = value.HasField("list")
    for kind in ("type", "s", "i", "b"):
        values = getattr(value.list, kind) if many else [getattr(value, kind)]
        if getattr(allowed, kind) and not set(values) <= set(getattr(allowed, kind)):
            return False
    return True


def _types(node: Any) -> str:
    """Returns the type attributes of a node, for example "T: uint8"."""
    found = {name: value.type for name, value in node.attr.items() if value.HasField("type")}
    return ", ".join(f"{name}: {tf.as_dtype(kind).name}" for name, kind in sorted(found.items()))


def _part(name: str, layers: Collection[str]) -> str:
    """Returns the innermost layer of an operation, from the scopes in its name."""
    for scope in reversed(name.split("/")[:-1]):
        # Keras makes a scope unique by a number: "dense" may become "dense_1".
        for layer in (scope, re.sub(r"_\d+$", "", scope)):
            if layer in layers:
                return f"layer {layer!r}"
    return "the step"
