"""The optimizer and the learning-rate schedule that a configuration describes."""

import inspect
from typing import Any

import keras
import tensorflow as tf

from trainer import keras_objects
from trainer.config import KerasObject, OptimizerConfig
from trainer.errors import InputError

# Runs and models of earlier versions use FusedAdam, a subclass of Adam with the same state.
keras.saving.get_custom_objects()["trainer>FusedAdam"] = keras.optimizers.Adam

# The learning rate is multiplied by this power of the number of devices, for a batch size that
# grows with that number. "linear": Goyal et al. 2017. "sqrt": Krizhevsky 2014.
_SCALE_POWER = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


def make_optimizer(config: OptimizerConfig, total_steps: int) -> keras.optimizers.Optimizer:
    """Creates the optimizer, with its learning-rate schedule if the configuration has one.

    The scope of the strategy must be active: the learning rate can depend on its replicas.
    `total_steps` of the whole run are the default length of a schedule.

    Raises:
        InputError: A name is unknown, or an option is refused.
    """
    if "learning_rate" in config.options:
        raise InputError("optimizer.options.learning_rate: use optimizer.learning_rate instead")
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    rate: Any = replicas ** _SCALE_POWER[config.learning_rate_scaling] * config.learning_rate
    if config.schedule is not None:
        warmup_steps = round(config.warmup_fraction * total_steps)
        rate = _make_schedule(config.schedule, rate, total_steps, warmup_steps)
    described = KerasObject(name=config.name, options=config.options)
    return keras_objects.make("optimizer", described, learning_rate=rate)


def try_optimizer(config: OptimizerConfig) -> None:
    """Creates the optimizer and takes one step: Keras finds some wrong options only then."""
    optimizer = make_optimizer(config, total_steps=100)
    variable = keras.Variable([[1.0]])
    try:
        optimizer.apply([keras.ops.ones_like(variable)], [variable])
    except keras_objects.KERAS_ERRORS as error:
        reason = keras_objects.explain(error)
        raise InputError(f"optimizer {config.name!r} cannot take a step: {reason}") from error


def _make_schedule(schedule: KerasObject, rate: float, total_steps: int, warmup_steps: int) -> Any:
    """Creates a schedule with the configured options; the others default to values of the run."""
    factory = keras_objects.find("schedule", schedule.name)
    decay_steps = max(1, total_steps - warmup_steps)
    defaults = {"initial_learning_rate": rate, "decay_steps": decay_steps}
    if warmup_steps:
        # Starts at a tenth of the rate, because the gradients of the first steps are the largest.
        warmup = {"warmup_target": rate, "warmup_steps": warmup_steps}
        defaults |= warmup | {"initial_learning_rate": rate / 10}
    accepted = inspect.signature(factory).parameters
    options = {k: v for k, v in defaults.items() if k in accepted} | schedule.options
    return keras_objects.call(factory, f"schedule {schedule.name!r}", options)


def averages_weights(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether an optimizer, or a part of it, averages weights (`use_ema`)."""
    if hasattr(optimizer, "inner_optimizer"):  # of a LossScaleOptimizer
        return averages_weights(optimizer.inner_optimizer)
    parts = getattr(optimizer, "optimizers", [optimizer])  # of a MultiOptimizer
    return any(each.use_ema for each in parts)
