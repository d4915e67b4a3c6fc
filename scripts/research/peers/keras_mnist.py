"""Trains the network of keras.io's example mnist_convnet by `model.fit`, and prints what it took.

    python keras_mnist.py MNIST.npz --seed 0

Written for `scripts/research/compare_peers.py`. It uses Keras alone, and nothing of this project.
"""

import argparse
import json
import time
from typing import Any

import keras
import numpy as np
from keras import layers

TARGET = 0.99


class UntilTarget(keras.callbacks.Callback):
    """Scores the test images after each epoch, and ends the training at the target."""

    def __init__(self, images: Any, labels: Any) -> None:
        """Takes the test images."""
        super().__init__()
        self.images, self.labels = images, labels
        self.epochs: list[tuple[float, float]] = []
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Scores."""
        accuracy = self.model.evaluate(self.images, self.labels, verbose=0)[1]
        self.epochs.append((time.perf_counter() - self.start, accuracy))
        self.model.stop_training = accuracy >= TARGET


def main() -> None:
    """Trains at most 15 epochs and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)
    kept = np.load(arguments.data)
    start = time.perf_counter()
    train, test = (
        np.expand_dims(kept[f"{split}_images"].astype("float32") / 255, -1)
        for split in ("train", "test")
    )
    labels, test_labels = (
        keras.utils.to_categorical(kept[f"{split}_labels"], 10) for split in ("train", "test")
    )
    model = keras.Sequential(
        [
            keras.Input(shape=(28, 28, 1)),
            layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
            layers.MaxPooling2D(pool_size=(2, 2)),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
    scores = UntilTarget(test, test_labels)
    model.fit(
        train,
        labels,
        batch_size=128,
        epochs=15,
        validation_split=0.1,
        callbacks=[scores],
        verbose=0,
    )
    seconds, accuracy = scores.epochs[-1]
    print(
        json.dumps(
            {
                "training_seconds": time.perf_counter() - start,
                "seconds_with_evaluation": seconds,
                "epochs": len(scores.epochs),
                "accuracy": accuracy,
                "version": keras.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
