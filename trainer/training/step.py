"""One training step and one test step on one replica: the only GradientTape that trains.

Both do what `keras.Model.train_step` and `test_step` do, in the same order, so that a compiled
model's losses, metrics and optimizer behave as Keras users know them. They differ in one thing: a
global batch that the replicas cannot share evenly is weighted exactly, where Keras weights every
replica alike. A model with steps of its own (`overrides`) is trained and scored by them.
"""

import inspect
from typing import Any

import keras
import tensorflow as tf


def overrides(model: keras.Model, method: str) -> bool:
    """Returns whether a model, or its class, has a method of its own in place of Keras's.

    Args:
        model: Any model.
        method: "train_step", "test_step", "compute_loss" or "compute_metrics".
    """
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
        images: This replica's part of the batch, [rows, H, W, C].
        labels: int64 [rows].
        sample_weight: float32 [rows], or None.
        batch_fraction: This replica's fraction of the rows of the global batch, float32 scalar in
            [0, 1]; None for one replica. A replica with fraction 0 still receives one row, because
            every replica must take part in the sum of gradients.
        clip_norm: Largest global norm of the gradients of the whole batch; None: not clipped.
        gradient_norms: Also return the norm of each weight's gradient.

    Returns:
        "loss": float32 scalar, this replica's part of the global batch's loss (they add up to it).
        "logs": What `model.compute_metrics` returned; empty if there are several replicas.
        "gradient_norms", if asked for: float32 [weights], of the whole batch's unclipped gradient;
        0 for a weight that the loss does not depend on.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    optimizer, weights = model.optimizer, model.trainable_variables
    # The names are the boxes that TensorBoard draws.
    with tf.GradientTape() as tape:
        with tf.name_scope("forward"):
            outputs = model(images, training=True)
        with tf.name_scope("loss"):
            loss = compute_loss(model, images, labels, outputs, sample_weight, training=True)
            mean_loss = (
                loss if batch_fraction is None else loss * replicas
            )  # Keras divides by the replicas
            part = mean_loss if batch_fraction is None else mean_loss * batch_fraction
            # mixed_float16 multiplies the loss so that small gradients do not vanish; the optimizer
            # divides them again. Left out, it would divide gradients that were never multiplied.
            scaled = optimizer.scale_loss(part)
    with tf.name_scope("gradients"):
        gradients = tape.gradient(scaled, weights)
    result: dict[str, Any] = {"loss": part}
    if clip_norm is not None or gradient_norms or _scales_loss(optimizer):
        with tf.name_scope("clip"):
            gradients, norms = _clip_whole_batch(gradients, optimizer, clip_norm)
        if gradient_norms:
            result["gradient_norms"] = norms
    with tf.name_scope("update"):
        optimizer.apply(gradients, weights)
    with tf.name_scope("metrics"):
        arguments = (images, labels, outputs, sample_weight)
        result["logs"] = _update_metrics(model, *arguments, mean_loss, batch_fraction)
    return result


def test_step(
    model: keras.Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    *,
    batch_fraction: tf.Tensor | None = None,
) -> tuple[tf.Tensor, dict[str, Any]]:
    """Updates the metrics of a compiled model.

    Args:
        model: Compiled.
        images: This replica's part of the batch, [rows, H, W, C].
        labels: int64 [rows].
        sample_weight: float32 [rows], or None.
        batch_fraction: As in `train_step`.

    Returns:
        The probabilities, float32 [rows, classes], and logs as in `train_step`.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    outputs = model(images, training=False)
    loss = compute_loss(model, images, labels, outputs, sample_weight, training=False)
    mean_loss = loss if batch_fraction is None else loss * replicas
    arguments = (images, labels, outputs, sample_weight)
    return outputs, _update_metrics(model, *arguments, mean_loss, batch_fraction)


def compute_loss(model: keras.Model, *arguments: Any, training: bool) -> tf.Tensor:
    """Returns the loss of a model; a `compute_loss` from before Keras 3.3 has no `training`.

    Args:
        model: Compiled.
        arguments: Images, labels, outputs and sample weights or None, as `compute_loss` takes them.
        training: Whether the model is trained or scored.
    """
    parameters = inspect.signature(model.compute_loss).parameters.values()
    takes_it = any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)
    return model.compute_loss(*arguments, **({"training": training} if takes_it else {}))


def _scales_loss(optimizer: keras.optimizers.Optimizer) -> bool:
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _clip_whole_batch(
    gradients: list[Any], optimizer: keras.optimizers.Optimizer, clip_norm: float | None
) -> tuple[list[Any], tf.Tensor]:
    """Clips by the norm of the whole batch's gradient, not by that of each replica's part.

    Returns:
        The gradients as `optimizer.apply` takes them, and the norm of each before clipping,
        float32 [weights].
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    present = [tf.convert_to_tensor(g) for g in gradients if g is not None]
    if replicas > 1:
        # The optimizer will add the replicas' gradients: give it equal parts of the sum. Equal
        # gradients also let every replica decide alike whether float16 has overflowed.
        context = tf.distribute.get_replica_context()
        present = [g / replicas for g in context.all_reduce(tf.distribute.ReduceOp.SUM, present)]
    scale = optimizer.scale_loss(tf.constant(1.0))
    exchanged = iter(present)
    gradients = [None if g is None else next(exchanged) for g in gradients]
    norms = tf.stack([0.0 if g is None else tf.norm(g) for g in gradients])  # [weights]
    norms *= replicas / scale
    if clip_norm is not None:
        factor = clip_norm / tf.maximum(tf.norm(norms), clip_norm)  # 1 where the norm is within
        gradients = [None if g is None else g * factor for g in gradients]
    return gradients, norms


def _update_metrics(
    model: keras.Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    outputs: tf.Tensor,
    sample_weight: tf.Tensor | None,
    mean_loss: tf.Tensor,
    batch_fraction: tf.Tensor | None,
) -> dict[str, Any]:
    """Tracks the loss, weighted by rows, and whatever metrics the model was compiled with."""

    def update() -> dict[str, Any]:
        # Keras's own tracker of the loss, also if a model lists other metrics as its own.
        tracker = next(m for m in keras.Model.metrics.fget(model) if m.name == "loss")
        tracker.update_state(mean_loss, sample_weight=tf.shape(labels)[0])
        logs: dict[str, Any] = model.compute_metrics(images, labels, outputs, sample_weight)
        return logs

    def update_shared() -> None:
        update()

    if batch_fraction is None:
        return update()
    # The one row that a replica without a share was given belongs to another replica.
    tf.cond(batch_fraction > 0, update_shared, lambda: None)
    return {}
