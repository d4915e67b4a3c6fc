"""Cross-entropy with label smoothing for integer labels."""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="trainer")
class SmoothedCrossentropy(keras.losses.CategoricalCrossentropy):
    """Keras's CategoricalCrossentropy with `label_smoothing`, for integer labels.

    The target probability of the right class is `1 - label_smoothing`, and the rest is spread over
    all classes, so that the network does not become overconfident. Source: Szegedy et al. 2016,
    Rethinking the Inception Architecture, section 7. The minimum is not 0 but the entropy of the
    targets: 0.50 for 10 classes and label_smoothing = 0.1.
    """

    def __init__(
        self, label_smoothing: float = 0.1, *, name: str = "smoothed_crossentropy", **options: Any
    ) -> None:
        """Stores the fraction that is spread over all classes, and the options of Keras's loss.

        Raises ValueError if `label_smoothing` is not in [0, 1).
        """
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 <= x < 1, received {label_smoothing}")
        super().__init__(label_smoothing=label_smoothing, name=name, **options)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, float32 [n].

        `y_true` is int [n] or [n, 1]; `y_pred` are probabilities, float [n, classes].
        """
        labels = keras.ops.one_hot(keras.ops.reshape(y_true, (-1,)), y_pred.shape[-1])
        return super().call(keras.ops.cast(labels, y_pred.dtype), y_pred)
