import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.errors import InputError
from trainer.run import Run
from trainer.training.weights import load_weights, save_weights


def refused(function: Callable[..., Any], *arguments: Any) -> str:
    """Returns the message of an InputError, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Stubborn(keras.layers.Layer):
    """A layer in whose midst the disk is full."""

    full = False
    message = "No space left on device"

    def call(self, inputs: Any) -> Any:
        return inputs

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.full:
            raise OSError(errno.ENOSPC, self.message)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "a-run")
    run.checkpoints.mkdir(parents=True)
    return run


@pytest.fixture
def trained(compiled_model: Callable[..., Any]) -> Callable[..., keras.Model]:
    """Makes a network and an Adam whose slots are not zero."""

    def make(seed: int, **options: Any) -> keras.Model:
        model = compiled_model(optimizer=keras.optimizers.Adam, seed=seed, **options)
        model.optimizer.build(model.trainable_variables)
        random = np.random.RandomState(seed)
        gradients = [tf.constant(random.normal(size=v.shape)) for v in model.trainable_variables]
        model.optimizer.apply([tf.cast(g, tf.float32) for g in gradients])
        return model

    return make


def variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the weights, and every variable of the optimizer."""
    return [*model.weights, *model.optimizer.variables]


def state(model: keras.Model) -> list[bytes]:
    return [variable.numpy().tobytes() for variable in variables(model)]


def test_weights_come_back_bit_for_bit(run: Run, trained: Callable[..., keras.Model]) -> None:
    model, other = trained(0), trained(1)
    other.optimizer.apply([tf.zeros(v.shape) for v in other.trainable_variables])
    before = state(model)
    pairs = zip(variables(other), before, state(other), strict=True)
    assert [variable.name for variable, a, b in pairs if a == b] == ["learning_rate"]
    assert {"kernel", "bias", "iteration"} < {v.name for v in variables(model)}
    save_weights(run.weights, model)
    assert [p.name for p in run.checkpoints.iterdir()] == [run.weights.name]
    assert state(model) == before
    load_weights(run.weights, other)
    assert state(other) == before
    save_weights(run.weights, trained(2))  # over what was there
    load_weights(run.weights, model)
    assert state(model) == state(trained(2))


def test_what_a_layer_keeps_besides_its_weights_comes_back(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    def layers() -> list[keras.layers.Layer]:
        nested = keras.Sequential([keras.layers.Dense(8), keras.layers.Dropout(0.5)])
        twice = keras.layers.Dense(8)
        return [keras.layers.BatchNormalization(), nested, twice, twice]

    model, other = (trained(seed, own_layers=layers) for seed in (0, 1))
    model.set_weights([weight + 1 for weight in model.get_weights()])  # also means and variances
    assert len(model.weights) == 12
    save_weights(run.weights, model)
    load_weights(run.weights, other)
    assert state(other) == state(model)


def test_a_weight_that_two_layers_know_comes_back(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    def layers() -> list[keras.layers.Layer]:
        return [keras.layers.SpectralNormalization(keras.layers.Dense(8))]

    model, other = (trained(seed, own_layers=layers) for seed in (0, 1))
    save_weights(run.weights, model)
    load_weights(run.weights, other)
    assert state(other) == state(model)


# What the two architectures' optimizers say on top is of no concern here.
@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_architecture_are_refused(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    save_weights(run.weights, trained(0))
    for layers in (
        lambda: [keras.layers.Dense(7)],
        lambda: [keras.layers.Dense(8), keras.layers.Dense(8)],
        lambda: [keras.layers.Reshape((4, 2)), keras.layers.Conv1D(1, 1), keras.layers.Flatten()],
    ):
        message = refused(load_weights, run.weights, trained(0, own_layers=layers))
        assert message.startswith(f"{run.weights} cannot be read into this model: ")


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_of_a_deeper_network_are_refused(run: Run) -> None:
    def network(depth: int) -> keras.Model:
        return keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(3) for _ in range(depth))])

    save_weights(run.weights, network(2))
    refused(load_weights, run.weights, network(1))


def test_a_damaged_file_of_weights_is_refused(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    model = trained(0)
    message = refused(load_weights, run.weights, model)
    assert message.startswith(f"{run.weights} cannot be read into this model: ")
    save_weights(run.weights, model)
    whole = run.weights.read_bytes()
    for damaged in (b"", b"some text", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        run.weights.unlink()  # HDF5 knows a file it has open by its inode
        run.weights.write_bytes(damaged)
        assert str(run.weights) in refused(load_weights, run.weights, model)


def test_weights_damaged_within_are_refused(run: Run, trained: Callable[..., keras.Model]) -> None:
    model = trained(0)
    save_weights(run.weights, model)
    whole = run.weights.read_bytes()
    assert b"HEAP" in whole
    run.weights.unlink()
    run.weights.write_bytes(whole.replace(b"HEAP", b"heap"))
    assert str(run.weights) in refused(load_weights, run.weights, model)


def test_a_save_that_fails_leaves_the_former_weights(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    layer = Stubborn()
    model = trained(0, own_layers=lambda: [layer])
    save_weights(run.weights, model)
    former, before = run.weights.read_bytes(), state(model)
    layer.full = True
    model.set_weights([weight + 1 for weight in model.get_weights()])
    message = refused(save_weights, run.weights, model)
    assert message.startswith(f"{run.weights}: about ")
    assert "No space left on device" in message
    assert run.weights.read_bytes() == former
    assert [p.name for p in run.checkpoints.iterdir()] == [run.weights.name]
    load_weights(run.weights, model)
    assert state(model) == before


def test_weights_that_have_no_folder_are_refused(
    run: Run, trained: Callable[..., keras.Model]
) -> None:
    run.checkpoints.rmdir()
    run.checkpoints.write_text("a file")
    message = refused(save_weights, run.weights, trained(0))
    assert re.match(f"{re.escape(str(run.weights))}: about [1-9][0-9]* bytes cannot be", message)
    assert run.checkpoints.read_text() == "a file"


def test_a_full_disk_is_one_line(run: Run, trained: Callable[..., keras.Model]) -> None:
    layer = Stubborn()
    layer.full, layer.message = True, "file write failed: time = Fri Jan  2\n, filename = 'a'"
    refused(save_weights, run.weights, trained(0, own_layers=lambda: [layer]))
