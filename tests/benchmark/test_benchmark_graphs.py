"""The graphs of `benchmark step` run on the device that they measure."""

from pathlib import Path

import pytest
import tensorflow as tf
from graphs import host_operations, partitions, prepare_mnist, traced_graphs

from trainer import devices
from trainer.benchmark import step
from trainer.config import Config
from trainer.experiment import PhaseTimer, build_experiment

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.skipif(
    not tf.sysconfig.get_build_info()["is_cuda_build"],
    reason="this TensorFlow lists no GPU kernels",
)
@pytest.mark.parametrize(
    ("name", "placement", "precision"),
    [
        ("debug", "device", "float32"),
        ("fashion_mnist", "stream", "mixed_bfloat16"),
        ("mnist", "device", "mixed_float16"),
    ],
)
def test_every_operation_has_a_gpu_kernel(name: str, placement: str, precision: str) -> None:
    """Other tests check the networks of all configurations."""
    with traced_graphs() as graphs:
        experiment = prepare_mnist(CONFIGS / f"{name}.toml", placement, precision, "one")
        train = experiment.batches("train", shuffled=True)
        images, labels = experiment.data.train.read(slice(4))
        gradients = step.trace_gradients(experiment, (tf.constant(images), tf.constant(labels)))
        for training in (True, False):
            epoch = step.bare_epoch(experiment, train, training=training)
            epoch(train.start_epoch(0), tf.constant(0), tf.constant(1))
        assert len(graphs()) == 2
        assert host_operations([gradients, *graphs()], experiment) == set()


def test_batches_are_read_where_the_step_is_measured() -> None:
    config = Config().with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 400, "height": 16, "width": 16, "classes": 4},
            "data.placement": "device",
            "training.precision": "float32",
            "training.batch_size": 64,
        }
    )
    experiment = build_experiment(config, PhaseTimer(), devices.single("CPU:1"))
    train = experiment.batches("train", shuffled=True)
    with partitions() as graphs, experiment.devices.scope():
        for training in (False, True):
            epoch = step.bare_epoch(experiment, train, training=training)
            epoch(train.start_epoch(0), tf.constant(0), tf.constant(2))
    gathers = [node for graph in graphs for node in graph.node if "Gather" in node.op]
    assert {node.device[-5:] for node in gathers} == {"CPU:1"}
    kinds = {tf.as_dtype(n.attr["T"].type).name for g in graphs for n in g.node if "Send" in n.op}
    assert "uint8" not in kinds
