"""Refuses models whose results on several devices do not sum to the result on one device."""

import keras
import tensorflow as tf

from trainer.errors import InputError
from trainer.training.step import overrides


def require_addable(model: keras.Model, *, jit_compile: bool) -> None:
    """Raises InputError for methods, options and losses that differ on several devices.

    Keras divides a loss by the number of replicas if it is a mean of one value per image. Only then
    is the sum over the replicas the loss of the batch.
    """
    methods = ("train_step", "test_step", "compute_loss", "compute_metrics")
    found = [f"a model with its own {method}" for method in methods if overrides(model, method)]
    options = ("gradient_accumulation_steps", "ema_overwrite_frequency")
    found += [option for option in options if getattr(model.optimizer, option, None)]
    found += ["training.jit_compile"] if jit_compile else []
    loss = keras.losses.get(model.loss)
    outputs = model(tf.zeros((2, *model.input_shape[1:]), model.inputs[0].dtype))
    values = getattr(loss, "call", loss)(tf.zeros((2,), tf.int64), outputs)
    if values.shape.rank == 0 or getattr(loss, "reduction", "mean") in ("sum", "none", None):
        found.append("training.loss without one value for each image and a reduction to their mean")
    regularized = [each for each in model.trainable_variables if each.regularizer is not None]
    if len(model.losses) > len(regularized):
        found.append("a layer that adds a loss")
    if found:
        raise InputError(f"{found[0]}: expected one device, received several")
