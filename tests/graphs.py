"""Helpers of the tests that look into the graphs of TensorFlow."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from trainer.config_file import load_config
from trainer.experiment import Experiment, PhaseTimer, build_experiment
from trainer.kernel_internals import check_kernels

# A module of a user: operations without a GPU kernel, or without an XLA kernel.
OWN_LAYERS = """
import keras
import tensorflow as tf

@keras.saving.register_keras_serializable(package="own")
class Shift(keras.layers.Layer):
    def call(self, x):
        return x + tf.cast(tf.random.shuffle(tf.range(3))[0], x.dtype)

class Outside(keras.layers.Layer):
    def call(self, x):
        y = tf.numpy_function(lambda x: x, [x], x.dtype)
        y.set_shape(x.shape)
        return y
"""


@contextmanager
def traced_graphs() -> Iterator[Callable[[], list[tf.Graph]]]:
    """Yields a function that returns the graphs traced so far from functions of this package."""
    functions: list[Any] = []
    real = tf.function

    def recorded(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(recorded, **options)
        made = real(function, **options)
        if function.__module__.startswith("trainer."):  # Keras makes some that it seldom traces
            functions.append(made)
        return made

    def graphs() -> list[tf.Graph]:
        concrete = [f for function in functions for f in function._list_all_concrete_functions()]
        return [function.graph for function in concrete]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf, "function", recorded)
        yield graphs
    keras.utils.clear_session()


def prepare_mnist(
    path: Path, placement: str, precision: str, count: str, **changes: Any
) -> Experiment:
    """Builds a configuration on a small data set with the shape of MNIST, with random weights."""
    config = load_config(path).with_changes(
        {
            "data.name": "synthetic",
            "data.options": {"examples": 200, "height": 28, "width": 28, "classes": 10},
            "data.placement": placement,
            "training.precision": precision,
            "training.batch_size": 32,
            "training.device": "all" if count == "two" else "cpu",
            "logging.histograms": True,
            **changes,
        }
    )
    return build_experiment(config, PhaseTimer(), initialize=False)


def host_operations(graphs: list[tf.Graph], experiment: Experiment) -> set[str]:
    """Returns the operations that have no GPU kernel."""
    names = experiment.devices.names if experiment.devices.replicas > 1 else ()
    reports = [check_kernels(graph, "GPU", traced_on=names) for graph in graphs]
    assert sum(report.operations for report in reports) > 300
    return {str(each) for report in reports for each in report.host}


@contextmanager
def partitions() -> Iterator[list[Any]]:
    """Collects the graph of each device of all functions that are called."""
    graphs: list[Any] = []
    context.enable_graph_collection()
    try:
        yield graphs
        collected = context.export_run_metadata().function_graphs
        graphs += [part for function in collected for part in function.partition_graphs]
    finally:
        context.disable_graph_collection()
