"""Counts the multiplications and additions of the matrix products in a graph.

`tf.compat.v1.profiler` counts the gradients of convolutions wrongly, and not those of Einsum.
"""

import itertools
import math

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
    found: set[tf.Operation] = set()
    pending = [*(tensor.op for tensor in graph.outputs), *graph.control_outputs]
    while pending:
        operation = pending.pop()
        if operation not in found:
            found.add(operation)
            pending += [*operation.control_inputs, *(tensor.op for tensor in operation.inputs)]
    if any(value.HasField("func") for each in found for value in each.node_def.attr.values()):
        return None
    try:
        return sum(2 * _multiplications(operation) for operation in found)
    except TypeError:  # an unknown dimension is None
        return None


def _multiplications(operation: tf.Operation) -> int:
    kind = operation.type
    if "MatMul" not in kind and "onv2" not in kind and kind != "Einsum":
        return 0
    inputs, output = [each.shape for each in operation.inputs], operation.outputs[0].shape
    if "MatMul" in kind:
        transposed = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        return int(math.prod(output) * inputs[0][-2 if transposed else -1])
    if kind == "Einsum":
        terms = operation.get_attr("equation").decode().partition("->")[0].split(",")
        sizes = dict(zip("".join(terms), itertools.chain(*inputs), strict=True))
        return math.prod(sizes.values()) if len(terms) > 1 else 0
    # One pass of the filter for each output number; each of the two gradients takes the same.
    kernel = inputs[1]
    if kind.endswith("BackpropFilter"):
        kernel, output = output, inputs[2]
    elif kind.endswith("BackpropInput"):
        output = inputs[2]
    return int(math.prod(output) * math.prod(kernel[:2] if "Depthwise" in kind else kernel[:-1]))
