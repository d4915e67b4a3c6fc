"""Cross-entropy with smoothed labels, for labels that are numbers of classes."""

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="trainer")
class SmoothedCrossentropy(keras.losses.Loss):
    """Keras's CategoricalCrossentropy with `label_smoothing`, which wants one-hot labels.

    The network is to give the right class a probability of `1 - label_smoothing`, and what is left
    to all classes alike, so that it does not become ever surer of what it knows. Source: Szegedy et
    al. 2016, Rethinking the Inception Architecture, section 7. The least value is not 0 but the
    entropy of such labels: 0.50 for 10 classes and 0.1.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        *,
        name: str = "smoothed_crossentropy",
        **options: Any,
    ) -> None:
        """Takes the share that is spread over all classes.

        Args:
            label_smoothing: In [0, 1).
            name: Of the loss.
            options: Of `keras.losses.Loss`: reduction, dtype.

        Raises:
            ValueError: It is out of range.
        """
        super().__init__(name=name, **options)
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: expected 0 <= share < 1, received {label_smoothing}"
            )
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, float32 [n].

        Args:
            y_true: int [n] or [n, 1].
            y_pred: Probabilities, float [n, classes].
        """
        labels = keras.ops.one_hot(keras.ops.reshape(y_true, (-1,)), y_pred.shape[-1])
        return keras.losses.categorical_crossentropy(
            keras.ops.cast(labels, y_pred.dtype), y_pred, label_smoothing=self.label_smoothing
        )

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` takes."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}
