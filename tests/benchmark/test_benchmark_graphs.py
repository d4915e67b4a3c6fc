"""The graphs of `trainer benchmark step`: kernels and placement."""

from pathlib import Path

import pytest
import tensorflow as tf
from test_placement import partitions, prepared

from trainer import devices
from trainer.benchmark import step
from trainer.config import load_config
from trainer.experiment import PhaseTimer, build_experiment
from trainer.kernels import check_kernels

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.skipif(
    not tf.sysconfig.get_build_info()["is_cuda_build"],
    reason="this TensorFlow lists no GPU kernels",
)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_operation_has_a_gpu_kernel(path: Path) -> None:
    changes = {
        "data.name": "synthetic",
        "data.options": {"examples": 200, "height": 28, "width": 28, "classes": 10},
        "training.batch_size": 32,
        "training.device": "cpu",
    }
    experiment = build_experiment(load_config(path).with_changes(changes), PhaseTimer())
    train = experiment.batches("train", shuffled=True)
    images, labels = experiment.data.train.read(slice(4))
    graphs = [step.trace_gradients(experiment, (tf.constant(images), tf.constant(labels)))]
    position = train.start_epoch(0), tf.constant(0), tf.constant(1)
    for training in (False, True):
        epoch = step.bare_epoch(experiment, train, training=training)
        graphs.append(epoch.get_concrete_function(*position).graph)  # type: ignore[attr-defined]
    reports = [check_kernels(graph, "GPU") for graph in graphs]
    assert sum(report.operations for report in reports) > 200
    assert {str(each) for report in reports for each in report.host} == set()


def test_batches_are_gathered_on_the_measured_device() -> None:
    experiment = prepared("device", devices.single("CPU:1"))
    train = experiment.batches("train", shuffled=True)
    with partitions() as graphs, experiment.devices.scope():
        for training in (False, True):
            epoch = step.bare_epoch(experiment, train, training=training)
            epoch(train.start_epoch(0), tf.constant(0), tf.constant(2))
    gathers = [node for graph in graphs for node in graph.node if "Gather" in node.op]
    assert {node.device[-5:] for node in gathers} == {"CPU:1"}
    kinds = {tf.as_dtype(n.attr["T"].type).name for g in graphs for n in g.node if "Send" in n.op}
    assert "uint8" not in kinds
