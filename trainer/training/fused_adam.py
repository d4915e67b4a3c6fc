"""Adam as one operation for each weight."""

from typing import Any

import keras
import tensorflow as tf

from trainer.keras_internals import adam_moments


@keras.saving.register_keras_serializable(package="trainer")
class FusedAdam(keras.optimizers.Adam):
    """Keras's Adam, with the same options, state and updates, done by TensorFlow's one kernel.

    Keras writes the update as a dozen operations for each weight; one operation takes 2 to 3% off a
    step of configs/mnist.toml (docs/performance.md). Updates equal Keras's up to the rounding of
    the weights' type. Source of the formula: Kingma and Ba 2015, Adam, the paragraph before section
    2.1, where epsilon is the "epsilon hat".
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Takes what `keras.optimizers.Adam` takes, but `amsgrad`.

        Raises:
            ValueError: `amsgrad` is asked for.
        """
        super().__init__(*arguments, **options)
        if self.amsgrad:
            raise ValueError("amsgrad: expected False, or Keras's own Adam; received True")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one weight; Keras calls it for each, on each device."""
        momentum, velocity = adam_moments(self, variable)
        dtype = variable.dtype
        step = tf.cast(self.iterations + 1, dtype)
        beta_1, beta_2 = (tf.constant(beta, dtype) for beta in (self.beta_1, self.beta_2))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=momentum.value.handle,
            v=velocity.value.handle,
            beta1_power=beta_1**step,
            beta2_power=beta_2**step,
            lr=tf.cast(learning_rate, dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.constant(self.epsilon, dtype),
            grad=tf.cast(tf.convert_to_tensor(gradient), dtype),
        )
