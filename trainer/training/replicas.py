"""Refuses models whose results on several devices do not sum to the result on one device."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.devices import Devices
from trainer.errors import InputError
from trainer.training.step import compute_loss, overrides


def require_addable(model: keras.Model, *, jit_compile: bool) -> None:
    """Checks for methods and options that do not work, or work differently, on several devices.

    Raises:
        InputError: The model has one of them.
    """
    for method in ("train_step", "test_step", "compute_metrics"):
        if overrides(model, method):
            raise InputError(
                f"a model with its own {method}: expected one device, received several"
            )
    options: dict[str, Any] = {"training.jit_compile": jit_compile}
    for name in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
        options[name] = getattr(model.optimizer, name, None)
    for name, value in options.items():
        if value:
            raise InputError(f"{name}: expected one device, received several")


def require_mean_loss(model: keras.Model, devices: Devices) -> None:
    """Refuses a loss that is not a mean over the images of a batch, or that Keras does not divide.

    Keras divides a loss by the number of replicas if it is a mean of one value per image. Only then
    is the sum over the replicas the loss of the batch. This is tested by three losses: of some
    images, of each of them twice, and as one replica computes it.

    Raises:
        InputError: The three results do not agree.
    """
    classes = int(model.output_shape[-1])
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2 * classes, *model.input_shape[1:]))
    labels = np.arange(2 * classes) % classes

    def loss(repeats: int) -> float:
        batch = tf.constant(np.repeat(images, repeats, axis=0), model.inputs[0].dtype)
        outputs = model(batch, training=False)
        truth = tf.constant(np.repeat(labels, repeats))
        return float(compute_loss(model, batch, truth, outputs, None, training=False))

    once, twice = loss(1), loss(2)
    with devices.scope():
        part = loss(1)
    tolerance = 0.02 if "float16" in model.dtype_policy.compute_dtype else 1e-3
    if not np.allclose([twice, part * devices.replicas], once, rtol=tolerance, atol=1e-6):
        raise InputError(
            "training.loss on several devices: expected one value for each image and a reduction "
            "to their mean, also of losses of layers; received a sum, or one number for the batch"
        )
