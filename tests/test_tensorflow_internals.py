"""Each name of TensorFlow that is not documented still works as this project uses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from trainer import tensorflow_internals
from trainer.keras_objects import nested_layers
from trainer.kernel_internals import check_kernels

lists_gpu_kernels = pytest.mark.skipif(
    not tf.sysconfig.get_build_info()["is_cuda_build"],
    reason="this TensorFlow lists no GPU kernels",
)

IMAGES = tf.zeros((8, 2, 2, 1), tf.uint8)
ROWS = tf.constant([1, 2], tf.int64)


def graph_of(function: Callable[..., Any]) -> tf.Graph:
    return tf.function(function).get_concrete_function().graph


def found(function: Callable[..., Any], **options: Any) -> list[str]:
    report = check_kernels(graph_of(function), "GPU", **options)
    return [f"{each.operation} {each.types}: {each.part}, {each.count}" for each in report.host]


@lists_gpu_kernels
def test_a_gather_has_a_gpu_kernel_from_a_variable_and_not_from_a_tensor() -> None:
    expected = ["GatherV2 Taxis: int32, Tindices: int64, Tparams: uint8: the step, 1"]
    assert found(lambda: tf.gather(IMAGES, ROWS)) == expected
    assert found(lambda: tf.gather(tf.cast(IMAGES, tf.float32), ROWS)) == []
    variable = tf.Variable(IMAGES)
    assert found(lambda: tf.gather(variable, ROWS)) == []
    labels = tf.Variable([1, 2, 3], dtype=tf.int32)
    assert found(lambda: tf.gather(labels, ROWS))[0].startswith("ResourceGather")
    labels = tf.Variable([1, 2, 3], dtype=tf.int64)
    assert found(lambda: tf.gather(labels, ROWS)) == []


@lists_gpu_kernels
def test_functions_within_functions_are_looked_through() -> None:
    def gather() -> tf.Tensor:
        return tf.gather(IMAGES, ROWS)

    expected = ["GatherV2 Taxis: int32, Tindices: int64, Tparams: uint8: the step, 1"]
    zero = tf.constant(0)
    inner = tf.function(gather)
    assert found(lambda: inner() + inner()) == expected  # one function, called twice
    assert found(lambda: tf.cond(zero > 0, gather, lambda: IMAGES[:2])) == expected

    def loop() -> Any:
        start = (zero, IMAGES[:2])
        return tf.while_loop(lambda i, _: i < 3, lambda i, _: (i + 1, gather()), start)

    assert found(loop) == expected
    compiled = tf.function(gather, jit_compile=True)
    assert found(compiled) == []  # XLA has its own kernels


@lists_gpu_kernels
def test_an_operation_that_is_placed_on_the_cpu_runs_on_the_host() -> None:
    def pinned() -> tf.Tensor:
        with tf.device("CPU:1"):
            return tf.sin(tf.random.uniform((3,)))

    assert "Sin" in [line.partition(" ")[0] for line in found(pinned)]
    assert found(pinned, traced_on=("CPU:0", "CPU:1")) == []
    assert check_kernels(graph_of(pinned), "CPU").host == ()


@lists_gpu_kernels
def test_a_missing_kernel_is_named_with_its_layer() -> None:
    outer = keras.Sequential([keras.layers.Lambda(lambda x: shuffled(x), name="shift_1")])
    report = check_kernels(
        graph_of(lambda: outer(tf.zeros((3, 2)))), "GPU", layers=["shift_1", "sequential"]
    )
    assert [str(each) for each in report.host] == [
        "RandomShuffle in layer 'shift_1' 2 times (T: int32)"
    ]
    assert str(report).startswith(f"2 of the {report.operations} operations of the training step")


def shuffled(x: Any) -> Any:
    order = tf.random.shuffle(tf.range(3)) + tf.random.shuffle(tf.range(3))
    return x + tf.cast(order[0], x.dtype)


@lists_gpu_kernels
def test_constraints_that_are_no_types_hold_too() -> None:
    x = tf.random.normal((3, 4))
    assert found(lambda: tf.gather_nd(x, [[0], [2]])) == []  # by the word for bad indices
    assert found(lambda: tf.math.approx_max_k(x, 2)) == []  # by numbers and truth values


@lists_gpu_kernels
def test_python_runs_on_the_host() -> None:
    def call() -> Any:
        return tf.py_function(lambda: 1.0, [], tf.float32)

    assert [each.partition(" ")[0] for each in found(call)] == ["EagerPyFunc"]


class Shuffles(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return x + tf.cast(tf.random.shuffle(tf.range(3))[0], x.dtype)


class Holds(keras.layers.Layer):
    """Holds a layer as an attribute, and one in a list."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.more = Shuffles(name="inner"), [Shuffles(name="listed")]

    def call(self, x: Any) -> Any:
        return self.more[0](self.inner(x))


@lists_gpu_kernels
@pytest.mark.parametrize("name", ["branch", "body", "while", "replica_1", "own"])
def test_layers_are_named_whatever_their_names_are_and_inner_ones_too(name: str) -> None:
    outer = [Holds(name="outer"), Shuffles(name=name)]
    names = [layer.name for layer in nested_layers(outer)]
    report = check_kernels(
        graph_of(lambda: outer[1](outer[0](tf.zeros((3, 2))))), "GPU", layers=names
    )
    parts = {each.part for each in report.host}
    assert parts == {"layer 'inner'", "layer 'listed'", f"layer {name!r}"}


def test_the_profiler_counts_marked_steps(tmp_path: Path) -> None:
    tf.profiler.experimental.start(str(tmp_path))
    for step in (3, 4):
        with tensorflow_internals.profiler_step(step):
            tf.ones(()).numpy()
    tf.profiler.experimental.stop()
    (path,) = tmp_path.rglob("*.xplane.pb")
    content = path.read_bytes()
    assert b"step_num" in content
    assert b"_r" in content
