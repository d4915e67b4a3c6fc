"""How much arithmetic a graph asks for: the multiplications and additions of its products."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def count_flops(graph: tf.Graph) -> int | None:
    """Returns the operations of all matrix products and convolutions that a graph's results need.

    A multiplication and an addition count as two. What is done for each element (activations,
    pooling, the optimizer's update) is left out: it is bound by memory, and the peak that the sum
    is held against is one of products. So does Chowdhery et al. 2022, PaLM, appendix B.

    Args:
        graph: Of a function, with fixed shapes.

    Returns:
        None where it cannot be known: a shape is open, a loop has products in it (an LSTM's), or
        two branches differ in theirs.
    """
    counts = [_of_operation(graph, operation) for operation in _needed(graph)]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _needed(graph: Any) -> set[tf.Operation]:
    """Returns what leads to the results; the rest (the gradient to the images) is never run."""
    found: set[tf.Operation] = set()
    left = [*(tensor.op for tensor in graph.outputs), *graph.control_outputs]
    while left:
        operation = left.pop()
        if operation not in found:
            found.add(operation)
            left += [*operation.control_inputs, *(tensor.op for tensor in operation.inputs)]
    return found


def _of_operation(graph: Any, operation: tf.Operation) -> int | None:
    names = [operation.get_attr(name).name for name in _PARTS.get(operation.type, ())]
    if names:
        inner = {count_flops(graph._get_function(name).graph) for name in names}
        same = inner.pop() if len(inner) == 1 else None
        return None if same and operation.type.endswith("While") else same
    return _counted(operation) if operation.type in _COUNTED else 0


def _counted(operation: tf.Operation) -> int | None:
    tensors = (*operation.inputs, *operation.outputs)
    if not all(tensor.shape.is_fully_defined() for tensor in tensors):
        return None
    return 2 * _COUNTED[operation.type](operation)


def _matmul(operation: tf.Operation) -> int:
    name = "transpose_a" if operation.type == "MatMul" else "adj_x"
    rows_first = operation.get_attr(name)
    inner = operation.inputs[0].shape[-2 if rows_first else -1]
    return int(math.prod(operation.outputs[0].shape) * inner)


def _einsum(operation: tf.Operation) -> int:
    terms = operation.get_attr("equation").decode().partition("->")[0].split(",")
    sizes = {
        label: size
        for term, tensor in zip(terms, operation.inputs, strict=True)
        for label, size in zip(term, tensor.shape.as_list(), strict=True)
    }
    return int(math.prod(sizes.values())) if len(terms) > 1 else 0


def _convolution(operation: tf.Operation) -> int:
    """Every number of the output takes the part of the filter that leads to it; so do gradients."""
    if operation.type.endswith("BackpropFilter"):
        kernel, output = operation.outputs[0].shape, operation.inputs[2].shape
    elif operation.type.endswith("BackpropInput"):
        kernel, output = operation.inputs[1].shape, operation.inputs[2].shape
    else:
        kernel, output = operation.inputs[1].shape, operation.outputs[0].shape
    depthwise = operation.type.startswith("Depthwise")
    return int(math.prod(output) * math.prod(kernel[:2] if depthwise else kernel[:-1]))


_COUNTED: dict[str, Callable[[tf.Operation], int]] = {
    **dict.fromkeys(("MatMul", "BatchMatMulV2", "BatchMatMulV3"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(
        (
            *("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"),
            "DepthwiseConv2dNative",
            *(f"DepthwiseConv2dNativeBackprop{part}" for part in ("Input", "Filter")),
        ),
        _convolution,
    ),
}

# Operations with graphs of their own, and the attributes that name these.
_PARTS = {
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), ("f",)),
    **dict.fromkeys(("If", "StatelessIf"), ("then_branch", "else_branch")),
    **dict.fromkeys(("While", "StatelessWhile"), ("body",)),
}
