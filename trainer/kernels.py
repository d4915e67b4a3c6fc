"""Operations of a traced graph that a device has no kernel for.

TensorFlow runs such an operation on the CPU without a message, and copies its inputs and outputs in
every step. The Linux package of TensorFlow lists the kernels of all devices, so this can be checked
on a machine without a GPU. The list is not part of TensorFlow's public interface; it is read here
and nowhere else. (On macOS and Windows, TensorFlow has no kernels for GPUs.)
"""

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import kernels as registry

# A kernel that is registered for this type serves every device. XLA is none.
_ANY_DEVICE = "DEFAULT"
_XLA_GPU = "XLA_GPU_JIT"
# They have a GPU kernel, which calls Python on the host.
_PYTHON_CALLS = {"EagerPyFunc", "PyFunc", "PyFuncStateless"}
# Scopes that TensorFlow adds to those of our step: the part of a step is shown without them.
_ADDED_SCOPES = re.compile(r"while|body|cond|branch|gradient_tape|replica|then|else|StatefulPart.*")


@dataclass(frozen=True)
class HostOperation:
    """An operation that runs on the CPU, although the step runs on another device.

    Attributes:
        operation: TensorFlow's name of it, for example "GatherV2".
        types: Its types, for example "Tparams: uint8, Tindices: int64".
        part: The layer, or the part of the step, that it belongs to: "layer 'shift'", "batch".
        count: How often the graph has it.
    """

    operation: str
    types: str
    part: str
    count: int

    def __str__(self) -> str:
        """Returns the operation in words."""
        times = f" {self.count} times" if self.count > 1 else ""
        return f"{self.operation} in {self.part}{times} ({self.types or 'any type'})"


@dataclass(frozen=True)
class KernelReport:
    """What was found in a graph.

    Attributes:
        device_type: For which kernels were looked up, "GPU" or "CPU".
        operations: How many operations the graph and its functions have.
        host: Those without a kernel for the device.
    """

    device_type: str
    operations: int
    host: tuple[HostOperation, ...]

    def __str__(self) -> str:
        """Returns the finding in one line."""
        kind, total = self.device_type, f"{self.operations:,}"
        if not self.host:
            return f"all {total} operations of the training step have a {kind} kernel"
        count = sum(each.count for each in self.host)
        named = "; ".join(map(str, self.host))
        return f"{count} of the {total} operations of the training step run on the CPU: {named}"


def check_kernels(
    graph: tf.Graph,
    device_type: str,
    *,
    layers: Collection[str] = (),
    traced_on: Collection[str] = (),
) -> KernelReport:
    """Looks up every operation of a graph, and of the functions that it calls.

    Functions that XLA compiles are left out: XLA has kernels of its own, and refuses a function
    that has an operation without one.

    Args:
        graph: Of a traced function.
        device_type: "GPU", "CPU", or another type that kernels are registered for.
        layers: Names of the layers that operations may belong to.
        traced_on: Devices that the graph itself names because it was traced for several of them.
            Operations that it places on another CPU run on the host.
    """
    nodes = list(_nodes(graph.as_graph_def()))
    missing = Counter(
        (node.op, _types(node), _part(node.name, layers))
        for node in nodes
        if _is_on_host(node, device_type, traced_on) or not _has_kernel(node, device_type)
    )
    host = (HostOperation(*key, count) for key, count in sorted(missing.items()))
    return KernelReport(device_type, len(nodes), tuple(host))


def check_xla(graph: tf.Graph, layers: Collection[str] = ()) -> tuple[HostOperation, ...]:
    """Returns the operations that XLA has no kernel for on a GPU.

    Args:
        graph: Of the function to compile.
        layers: Names of the layers that operations may belong to.
    """
    tf.function(lambda: tf.zeros(()), jit_compile=True)()  # XLA lists its kernels at its first use
    _registered.cache_clear()
    missing = check_kernels(graph, _XLA_GPU, layers=layers).host
    return tuple(each for each in missing if each.operation != "Placeholder")  # the arguments


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """Returns the innermost layer in whose scope an operation was made, None if in none.

    Args:
        name: Of the operation.
        layers: Names of layers. Keras makes a scope unique by a number: "dense" may become
            "dense_1".
    """
    for scope in reversed(name.split("/")[:-1]):
        for candidate in (scope, re.sub(r"_\d+$", "", scope)):
            if candidate in layers:
                return candidate
    return None


def xla_refusal(error: Exception, layers: Collection[str]) -> str | None:
    """Returns what XLA cannot compile, in words; None if an error is about something else.

    Args:
        error: Raised by TensorFlow when it called a compiled function.
        layers: Names of the layers that operations may belong to.
    """
    found = re.search(r"node [`{]*(\S+?)[`}]", text := str(error))
    if found is None or not re.search("trying to compile|XLA", text):
        return None
    operation = re.search(r"No registered '(\w+)'|with op (\w+)", text)
    named = (operation[1] or operation[2]) if operation else found[1].rpartition("/")[2]
    constant = " (a shape depends on values)" if "compile-time constant" in text else ""
    return f"{named} in {_part(found[1], layers)}{constant}"


def _nodes(graph: Any) -> Iterator[Any]:
    """Yields the nodes of a GraphDef and of the functions it reaches, but for compiled ones."""
    functions = {function.signature.name: function for function in graph.library.function}
    seen: set[str] = set()
    waiting: list[Any] = [graph.node]
    while waiting:
        for node in waiting.pop():
            compiled = node.attr["_XlaMustCompile"].b
            called = set() if compiled else _called(node) & functions.keys()
            waiting += [functions[name].node_def for name in sorted(called - seen)]
            seen |= called
            if not compiled and node.op not in functions:
                yield node


def _called(node: Any) -> set[str]:
    """Returns the functions that a node calls."""
    values = node.attr.values()
    named = {value.func.name for value in values if value.HasField("func")}
    listed = {func.name for value in values for func in value.list.func}
    return named | listed | {node.op}


def _is_on_host(node: Any, device_type: str, traced_on: Collection[str]) -> bool:
    """Returns whether the graph itself places a node on the CPU of another device."""
    name = node.device.rpartition("/device:")[2]
    pinned = name.startswith("CPU") and name not in traced_on
    return device_type == "GPU" and (pinned or node.op in _PYTHON_CALLS)


def _has_kernel(node: Any, device_type: str) -> bool:
    types = (device_type,) if device_type == _XLA_GPU else (device_type, _ANY_DEVICE)
    return any(
        kernel.device_type in types
        and kernel.label == node.attr["_kernel"].s.decode()
        and all(_allows(constraint, node) for constraint in kernel.constraint)
        for kernel in _registered(node.op)
    )


@functools.cache
def _registered(operation: str) -> list[Any]:
    return list(registry.get_registered_kernels_for_op(operation).kernel)


def _allows(constraint: Any, node: Any) -> bool:
    """Returns whether a kernel's constraint on an attribute holds for a node."""
    value, allowed = node.attr[constraint.name], constraint.allowed_values.list
    values = value.list if value.HasField("list") else None
    return all(
        set(getattr(values, kind) if values else [getattr(value, kind)]) <= set(listed)
        for kind in ("type", "s", "i", "b")
        if (listed := getattr(allowed, kind))
    )


def _types(node: Any) -> str:
    """Returns the type attributes of a node, for example "T: uint8"."""
    found = {name: value.type for name, value in node.attr.items() if value.HasField("type")}
    return ", ".join(f"{name}: {tf.as_dtype(kind).name}" for name, kind in sorted(found.items()))


def _part(name: str, layers: Collection[str]) -> str:
    layer = layer_of(name, layers)
    if layer is not None:
        return f"layer {layer!r}"
    scopes = _scopes(name)
    return scopes[0] if scopes else "the step"


def _scopes(name: str) -> list[str]:
    """Returns the scopes of an operation, outermost first, without those that TensorFlow adds."""
    scopes = name.split("/")[:-1]
    plain = [scope for scope in scopes if not _ADDED_SCOPES.fullmatch(re.sub(r"_\d+$", "", scope))]
    return [scope for scope in plain if scope.strip("_0123456789")]
