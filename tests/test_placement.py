"""A step reads data from its own device; tested with two logical CPU devices."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from graphs import partitions

from trainer import devices
from trainer.config import Config
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.training.batches import ResidentBatches

# One image has 256 bytes, much more than the gradients of the 20 weights.
BATCH_SIZE = 64
LAYERS = [{"name": "AveragePooling2D", "options": {"pool_size": 8}}]


def prepared(placement: str, chosen: devices.Devices | None) -> Experiment:
    """Builds a network with small gradients on one device or on both."""
    changes = {
        "data.name": "synthetic",
        "data.options": {"examples": 400, "height": 16, "width": 16, "classes": 4},
        "data.placement": placement,
        "model.name": "layers",
        "model.options": {"layers": LAYERS},
        "training.device": "all",
        "training.precision": "float32",
        "training.batch_size": BATCH_SIZE,
    }
    return build_experiment(Config().with_changes(changes), PhaseTimer(), chosen)


def sent(graphs: list[Any], traced: list[tf.Graph]) -> dict[str, int]:
    """Returns the bytes of every tensor that one device sends to another, by the tensor's name.

    Args:
        graphs: Of each device.
        traced: Graphs from which these were made; they know more shapes.
    """
    found = {}
    for graph in graphs:
        imported = imported_graph(graph)
        for node in graph.node:
            if node.op not in ("_Send", "_HostSend"):
                continue
            source = imported.get_operation_by_name(node.name).inputs[0]
            name = node.attr["tensor_name"].s.decode()
            shape = source.shape
            if shape.rank is None:
                shape = traced_shape(name, source.dtype, traced)
            sizes = [BATCH_SIZE if size is None else size for size in shape]
            found[name] = int(np.prod(sizes)) * source.dtype.size
    return found


def imported_graph(graph: Any) -> tf.Graph:
    """Imports a graph under names that TensorFlow accepts from outside."""
    for node in graph.node:
        node.name = f"n{node.name}"
        node.input[:] = [re.sub(r"^\^?", r"\g<0>n", name, count=1) for name in node.input]
        node.attr.pop("_class", None)
    imported = tf.Graph()
    with imported.as_default():
        tf.import_graph_def(graph, name="")
    return imported


def traced_shape(name: str, dtype: Any, traced: list[tf.Graph]) -> Any:
    """Returns the shape of a tensor by its name in a graph that was traced from Python."""
    plain = re.sub(r"^edge_\d+_|while/body/_\d+/", "", name)
    for graph in traced:
        try:
            return graph.get_operation_by_name(plain).outputs[0].shape
        except KeyError:
            continue
    assert re.search(r"Func/while/\w+/_\d+/input/_\d+$", name), f"a shape is unknown: {name}"
    assert dtype == tf.int32  # counters of the loop: neither images nor labels nor the order
    return ()


def run_call(experiment: Experiment, batches: Any) -> list[Any]:
    """Runs one call of three steps; returns the graphs of each device."""
    call, state = experiment.loop.trace(batches), batches.start_epoch(0)
    with partitions() as graphs:
        call(state, 0, 3)
    return graphs


@pytest.mark.parametrize("placement", ["device", "stream"])
@pytest.mark.parametrize("where", ["second", "both"])
def test_no_images_cross_between_devices_in_a_step(placement: str, where: str) -> None:
    experiment = prepared(placement, devices.single("CPU:1") if where == "second" else None)
    batches = experiment.batches("train", shuffled=True)
    graphs = run_call(experiment, batches)
    traced = [experiment.loop.step_graph, experiment.loop.trace(batches).graph]
    crossing = sent(graphs, traced)
    assert len(crossing) > 3  # counters of the loop, at least
    assert sum(crossing.values()) < 1000
    kinds = {tf.as_dtype(n.attr["T"].type).name for g in graphs for n in g.node if "Send" in n.op}
    assert kinds <= {"bool", "float32", "int32", "int64"}
    names = {node.device[-5:] for graph in graphs for node in graph.node if "Gather" in node.op}
    names |= {n.device[-5:] for graph in graphs for n in graph.node if n.op == "IteratorGetNext"}
    assert names == ({"CPU:1"} if where == "second" else {"CPU:0", "CPU:1"})


def test_the_method_detects_images_that_cross() -> None:
    """The test method counts all bytes of a batch on another device."""
    with tf.device("CPU:0"):
        images = tf.zeros((BATCH_SIZE, 16, 16, 1), tf.uint8)

    @tf.function
    def add(images: Any) -> Any:
        with tf.device("CPU:1"):
            return tf.reduce_sum(tf.cast(images, tf.float32)) + 1.0

    traced = add.get_concrete_function(images)
    with partitions() as graphs, tf.device("CPU:0"):
        traced(images)
    assert sum(sent(graphs, [traced.graph]).values()) >= BATCH_SIZE * 16 * 16


@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_each_device_stores_its_own_images(where: str) -> None:
    names = {"first": ["CPU:0"], "second": ["CPU:1"], "both": ["CPU:0", "CPU:1"]}[where]
    experiment = prepared("device", None if where == "both" else devices.single(names[0]))
    batches = experiment.batches("train", shuffled=True)
    assert isinstance(batches, ResidentBatches)
    images, labels = experiment.data.train.read()
    for values, expected in zip(batches.start_epoch(0), (images, labels, None), strict=True):
        local = experiment.devices.strategy.experimental_local_results(values)
        assert [value.device.rpartition("device:")[2] for value in local] == names
        for value in local if expected is not None else ():
            np.testing.assert_array_equal(value.numpy(), expected)
    # The same for weights, optimizer state and metrics.
    for variable in [*experiment.model.variables, *experiment.model.optimizer.variables]:
        local = experiment.devices.strategy.experimental_local_results(variable.value)
        assert [value.device.rpartition("device:")[2] for value in local] == names, variable.path


def test_training_on_the_second_device_equals_the_first() -> None:
    ends = []
    for name in ("CPU:0", "CPU:1"):
        for placement in ("device", "stream"):
            experiment = prepared(placement, devices.single(name))
            train = experiment.batches("train", shuffled=True)
            validation = experiment.batches("validation")
            experiment.loop.fit(train, validation, epochs=2)
            scores, probabilities = experiment.loop.evaluate(validation, collect=True)
            ends.append([*experiment.model.get_weights(), scores["loss"], probabilities])
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_streamed_epoch_can_be_stopped_early(
    tiny: Any, batches_of: Callable[..., Any], two_devices: Any
) -> None:
    """The iterator is deleted while it prefetches batches."""
    for chosen in (devices.single("CPU:1"), two_devices):
        batches = batches_of(tiny.train, chosen, 8, placement="stream", seed=0)
        for epoch in range(20):
            state = batches.start_epoch(epoch)
            (first, *_) = chosen.strategy.experimental_local_results(state)
            assert len(next(first)[0]) == 8 // chosen.replicas
            del state, first
