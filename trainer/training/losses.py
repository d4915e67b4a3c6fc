"""Cross-entropy with label smoothing for integer labels."""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="trainer")
class SmoothedCrossentropy(keras.losses.Loss):
    """Keras's CategoricalCrossentropy with `label_smoothing`, which needs one-hot labels.

    The target probability of the right class is `1 - label_smoothing`, and the rest is spread over
    all classes, so that the network does not become overconfident. Source: Szegedy et al. 2016,
    Rethinking the Inception Architecture, section 7. The minimum is not 0 but the entropy of the
    targets: 0.50 for 10 classes and label_smoothing = 0.1.
    """

    def __init__(
        self, label_smoothing: float = 0.1, *, name: str = "smoothed_crossentropy", **options: Any
    ) -> None:
        """Stores the fraction that is spread over all classes.

        Args:
            label_smoothing: In [0, 1).
            name: Name of the loss.
            options: Options of `keras.losses.Loss`: reduction, dtype.

        Raises:
            ValueError: `label_smoothing` is out of range.
        """
        super().__init__(name=name, **options)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 <= x < 1, received {label_smoothing}")
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, float32 [n].

        Args:
            y_true: int [n] or [n, 1].
            y_pred: Probabilities, float [n, classes].
        """
        labels = keras.ops.one_hot(keras.ops.reshape(y_true, (-1,)), y_pred.shape[-1])
        labels = keras.ops.cast(labels, y_pred.dtype)
        smoothing = self.label_smoothing
        return keras.losses.categorical_crossentropy(labels, y_pred, label_smoothing=smoothing)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `from_config`."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}
