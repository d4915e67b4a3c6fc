"""One training step and one test step on one replica. No other code trains the model.

Both do what `keras.Model.train_step` and `test_step` do, in the same order, so that the losses,
metrics and optimizer of a compiled model behave as in Keras. There is one difference: a batch may
be split unevenly. Then each replica is weighted by its number of rows. Keras gives all replicas the
same weight.

`training.step` names a function that replaces `train_step`: `step(model, images, labels)` updates
the weights and returns logs as `keras.Model.train_step` does, a dictionary with "loss". If the logs
have the names of the model's metrics, the metrics are reported, else the logs themselves.
`batch_fraction`, `clip_norm` and `gradient_norms` are passed to a function that has parameters of
these names.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from trainer import keras_objects
from trainer.errors import InputError, expect


def overrides(model: keras.Model, method: str) -> bool:
    """Returns whether a model or its class replaces a method of `keras.Model`."""
    return getattr(getattr(model, method), "__func__", None) is not getattr(keras.Model, method)


def train_step(
    model: keras.Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    *,
    batch_fraction: tf.Tensor | None = None,
    clip_norm: float | None = None,
    gradient_norms: bool = False,
) -> dict[str, Any]:
    """Updates the weights of a compiled model once, and its metrics.

    Args:
        model: Compiled, its optimizer built.
        images: Rows of the batch for this replica, [rows, H, W, C].
        labels: int64 [rows].
        sample_weight: float32 [rows], or None.
        batch_fraction: `LocalBatch.fraction`; None for one replica. A replica with fraction 0
            still receives one row, because it must take part in the sum of gradients.
        clip_norm: Largest global norm of the gradients of the whole batch; None: not clipped.
        gradient_norms: Also return the norm of each weight's gradient.

    Returns:
        "loss": float32 scalar, this replica's part of the loss of the global batch. The sum of the
        parts is the loss. With one replica also the metrics, as `model.compute_metrics` returns
        them; a model that overrides this method also determines "loss".
        "gradient_norms", if requested: float32 [weights], norms for the whole batch before
        clipping; 0 for a weight that does not influence the loss.
    """
    optimizer, weights = model.optimizer, model.trainable_variables
    # TensorBoard draws a box for each name scope.
    with tf.GradientTape() as tape:
        with tf.name_scope("forward"):
            outputs = model(images, training=True)
        with tf.name_scope("loss"):
            data = (images, labels, outputs, sample_weight)
            mean_loss = _mean_loss(model, data, batch_fraction, training=True)
            part = mean_loss if batch_fraction is None else mean_loss * batch_fraction
            # mixed_float16 multiplies the loss so that small gradients do not become 0. The
            # optimizer divides the gradients by the same factor.
            scaled = optimizer.scale_loss(part)
    with tf.name_scope("gradients"):
        gradients = tape.gradient(scaled, weights)
    if all(gradient is None for gradient in gradients):
        raise InputError("training.loss: expected a loss that depends on weights, received none")
    scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    norms = None
    if clip_norm is not None or gradient_norms or scales_loss:
        with tf.name_scope("clip"):
            gradients, norms = _sum_and_clip(gradients, optimizer, clip_norm)
    with tf.name_scope("update"):
        optimizer.apply(gradients, weights)
    with tf.name_scope("metrics"):
        logs = _update_metrics(model, data, mean_loss, batch_fraction)
    if not overrides(model, "compute_metrics"):
        logs = {**logs, "loss": part}
    return {**logs, "gradient_norms": norms} if gradient_norms else logs


def test_step(
    model: keras.Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    batch_fraction: tf.Tensor | None = None,
) -> dict[str, Any]:
    """Updates the metrics of a compiled model. Calls the model's own `test_step` if it has one.

    Returns:
        With one replica the logs. "outputs": the probabilities, float32 [rows, classes].
    """
    outputs = model(images, training=False)
    if overrides(model, "test_step"):
        logs = model.test_step((images, labels))
    else:
        data = (images, labels, outputs, None)
        mean_loss = _mean_loss(model, data, batch_fraction, training=False)
        logs = _update_metrics(model, data, mean_loss, batch_fraction)
    return metric_tensors(logs) | {"outputs": tf.cast(outputs, tf.float32)}


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


def compute_loss(model: keras.Model, *arguments: Any, training: bool) -> tf.Tensor:
    """Returns the loss for images, labels, outputs, and sample weights or None.

    Older models have a `compute_loss` without `training`.
    """
    options = {"training": training} if _accepts(model.compute_loss, "training") else {}
    return model.compute_loss(*arguments, **options)


def find_step(name: str) -> Callable[..., Any]:
    """Returns the function that `training.step` names.

    Raises:
        InputError: It does not exist, or does not take a model, images and labels.
    """
    step: Callable[..., Any] = keras_objects.import_object("training.step", name)
    received = getattr(step, "__qualname__", type(step).__name__)
    fits = callable(step) and takes(step, 3)
    expect(fits, f"training.step {name!r}", "a function of (model, images, labels)", received)
    return step


def bind_step(
    step: Callable[..., Any],
    model: keras.Model,
    *,
    replicas: int = 1,
    weighted: bool = False,
    **options: Any,
) -> Callable[..., dict[str, tf.Tensor]]:
    """Returns the step of a model as a function of images, labels, weights and batch_fraction.

    A model with its own `train_step` uses that. `options` are `clip_norm` and `gradient_norms`. If
    `weighted`, the step gets sample weights.

    Raises:
        InputError: Two steps are given, or the step lacks a parameter that is needed.
    """
    name = f"training.step {getattr(step, '__name__', step)}"
    if overrides(model, "train_step"):
        if step is not train_step:
            raise InputError(f"{name}: expected a model without its own train_step")
        name, step = "train_step", lambda model, *data: model.train_step(data)
    if options.get("clip_norm") is not None and not _accepts(step, "clip_norm"):
        raise InputError(f"training.clip_norm: {name} has no parameter clip_norm")
    if weighted and not takes(step, 4):
        raise InputError(f"training.class_weight: {name} takes no sample weights")
    if replicas > 1 and not _accepts(step, "batch_fraction"):
        raise InputError(f"{name}: on several devices expected a parameter batch_fraction")

    def bound(
        images: tf.Tensor, labels: tf.Tensor, sample_weight: Any, batch_fraction: Any
    ) -> dict[str, tf.Tensor]:
        every = {**options, "batch_fraction": batch_fraction}
        accepted = {key: value for key, value in every.items() if _accepts(step, key)}
        weights = [] if sample_weight is None else [sample_weight]
        result = step(model, images, labels, *weights, **accepted)
        logs = metric_tensors(result) if isinstance(result, dict) else {}
        loss = logs.get("loss")
        fits = loss is not None and loss.shape == () and loss.dtype.is_floating
        shapes = ", ".join(f"{key} {value.shape}" for key, value in logs.items())
        received = shapes or type(result).__name__
        expect(fits, name, "a dictionary of logs with 'loss' (a number)", received)
        return logs

    return bound


def takes(function: Callable[..., Any], count: int) -> bool:
    """Returns whether a function can be called with a number of positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except (TypeError, ValueError):  # ValueError: a class without a signature
        return False
    return True


def _accepts(function: Callable[..., Any], option: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters)


def metric_tensors(logs: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Returns logs as tensors. As in Keras, each entry of a nested dictionary is a log."""
    found: dict[str, tf.Tensor] = {}
    for name, value in logs.items():
        if isinstance(value, dict):
            found |= metric_tensors(value)
        elif isinstance(value, list | tuple):
            found[name] = tf.stack([tf.convert_to_tensor(part) for part in value])
        else:
            found[name] = tf.convert_to_tensor(value)
    return found


def _mean_loss(
    model: keras.Model, data: tuple[Any, ...], batch_fraction: tf.Tensor | None, *, training: bool
) -> tf.Tensor:
    """Returns the mean loss over the rows of this replica; `data` is as in `compute_loss`."""
    loss = compute_loss(model, *data, training=training)
    # With several replicas, Keras divides the loss by their number.
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return loss if batch_fraction is None else loss * replicas


def _sum_and_clip(
    gradients: list[Any], optimizer: keras.optimizers.Optimizer, clip_norm: float | None
) -> tuple[list[Any], tf.Tensor]:
    """Sums the gradients of all replicas, and clips the sum by its global norm.

    Also returns the norm of each gradient before clipping, float32 [weights].
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    present = [tf.convert_to_tensor(g) for g in gradients if g is not None]
    if replicas > 1:
        # The optimizer adds the gradients of the replicas, so each gets an equal part of the sum.
        # Equal gradients also let all replicas agree whether float16 has overflowed.
        context = tf.distribute.get_replica_context()
        present = [g / replicas for g in context.all_reduce(tf.distribute.ReduceOp.SUM, present)]
    scale = optimizer.scale_loss(tf.constant(1.0))
    summed = iter(present)
    gradients = [None if g is None else next(summed) for g in gradients]
    norms = tf.stack([0.0 if g is None else tf.norm(g) for g in gradients])  # [weights]
    norms *= replicas / scale
    if clip_norm is not None:
        factor = clip_norm / tf.maximum(tf.norm(norms), clip_norm)  # 1 if the norm is smaller
        gradients = [None if g is None else g * factor for g in gradients]
    return gradients, norms


def _update_metrics(
    model: keras.Model, data: tuple[Any, ...], mean_loss: tf.Tensor, batch_fraction: Any
) -> dict[str, Any]:
    """Updates the metrics of a model, and its loss; returns their results with one replica."""
    logs: dict[str, Any] = {}

    def update() -> None:
        # The property of the base class has the tracker of the loss even if a model overrides it.
        tracker = next(m for m in keras.Model.metrics.fget(model) if m.name == "loss")
        tracker.update_state(mean_loss, sample_weight=tf.shape(data[1])[0])  # by rows
        logs.update(model.compute_metrics(*data))

    if batch_fraction is None:
        update()
        return logs
    # With fraction 0, the only row belongs to another replica.
    tf.cond(batch_fraction > 0, update, lambda: None)
    return {}
