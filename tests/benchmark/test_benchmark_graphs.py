"""The graphs of `benchmark step` run on the device that they measure."""

from pathlib import Path

import pytest
import tensorflow as tf
from graphs import partitions, prepare_mnist, traced_graphs

from trainer import devices
from trainer.benchmark import step
from trainer.config import Config
from trainer.experiment import PhaseTimer, build_experiment
from trainer.kernel_internals import check_kernels

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
        examples = map(tf.constant, experiment.data.train.read(slice(4)))
        step.trace_gradients(experiment.model, *examples)
        next(step.repeat_batches(experiment, train, 1, "CPU:0"))
        gradients, batches = (check_kernels(graph, "GPU") for graph in graphs())
    assert (gradients.host, batches.host) == ((), ())
    assert gradients.operations > 50
    assert batches.operations > 20


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
        next(step.repeat_batches(experiment, train, 2, "CPU:1"))
    gathers = [node for graph in graphs for node in graph.node if "Gather" in node.op]
    assert {node.device[-5:] for node in gathers} == {"CPU:1"}
    kinds = {tf.as_dtype(n.attr["T"].type).name for g in graphs for n in g.node if "Send" in n.op}
    assert "uint8" not in kinds
