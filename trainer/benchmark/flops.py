"""Counts the multiplications and additions of the matrix products in a graph."""

import math
from collections.abc import Callable

import tensorflow as tf


def count_flops(graph: tf.Graph) -> int | None:
    """Returns the operations of all matrix products and convolutions that the results need.

    A multiplication and an addition count as two. Elementwise work (activations, pooling, the
    optimizer's update) is not counted: memory limits it, and the count is compared with the peak
    of products. Chowdhery et al. 2022, PaLM, appendix B, count in the same way.

    Args:
        graph: Graph of a function, with fixed shapes.

    Returns:
        None if the count is unknown: a shape is open, or the graph calls other graphs (loops,
        branches, functions).
    """
    operations = _needed_operations(graph)
    products = [operation for operation in operations if operation.type in _PRODUCTS]
    tensors = [tensor for each in products for tensor in (*each.inputs, *each.outputs)]
    attributes = [value for each in operations for value in each.node_def.attr.values()]
    calls_graph = any(value.HasField("func") for value in attributes)
    if calls_graph or not all(tensor.shape.is_fully_defined() for tensor in tensors):
        return None
    return sum(2 * _PRODUCTS[operation.type](operation) for operation in products)


def _needed_operations(graph: tf.Graph) -> set[tf.Operation]:
    """Returns the operations that lead to the results; the others are never executed."""
    found: set[tf.Operation] = set()
    pending = [*(tensor.op for tensor in graph.outputs), *graph.control_outputs]
    while pending:
        operation = pending.pop()
        if operation not in found:
            found.add(operation)
            pending += [*operation.control_inputs, *(tensor.op for tensor in operation.inputs)]
    return found


def _matmul(operation: tf.Operation) -> int:
    name = "transpose_a" if operation.type == "MatMul" else "adj_x"
    inner = operation.inputs[0].shape[-2 if operation.get_attr(name) else -1]
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
    """Counts one pass of the filter for each output number; both gradients take the same."""
    kernel, output = operation.inputs[1].shape, operation.outputs[0].shape
    if operation.type.endswith("BackpropFilter"):
        kernel, output = operation.outputs[0].shape, operation.inputs[2].shape
    elif operation.type.endswith("BackpropInput"):
        output = operation.inputs[2].shape
    depthwise = operation.type.startswith("Depthwise")
    return int(math.prod(output) * math.prod(kernel[:2] if depthwise else kernel[:-1]))


_PRODUCTS: dict[str, Callable[[tf.Operation], int]] = {
    **dict.fromkeys(("MatMul", "BatchMatMulV2", "BatchMatMulV3"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(
        (
            *("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"),
            *("DepthwiseConv2dNative", "DepthwiseConv2dNativeBackpropInput"),
            "DepthwiseConv2dNativeBackpropFilter",
        ),
        _convolution,
    ),
}
