"""The common interface of networks: operations, layers, training, saving, loading, deployment.

    python scripts/introduction_3_networks.py

Last of three; it trains on made-up images and takes seconds. `trainer fit` and the
verbs of `saving` do the same on the command line.
"""

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import trainer


def main(folder: Path) -> None:
    """Goes through all six, and says what each gives."""
    # An operation is a function of tensors; a layer is one with weights; a network is made of both.
    pixels = tf.random.stateless_uniform((3, 28, 28), seed=(0, 0))
    flat = tf.reshape(pixels, (3, 784))
    layer = keras.layers.Dense(10, activation="softmax")
    print(f"a layer: {flat.shape} -> {layer(flat).shape} by {layer.count_params()} weights")

    # Training: the configuration names data, network and optimizer; the step is trainer's own.
    config = trainer.load_config("configs/debug.toml")
    config = config.with_changes({"training.epochs": 8, "logging.directory": str(folder / "runs")})
    fitted = trainer.fit(config)
    run = str(fitted.summary["run"])
    print(f"trained on made-up images: test accuracy {fitted.summary['test']['accuracy']:.2f}")

    # Saving and loading: one file, the same network, from raw images to probabilities.
    images = np.random.default_rng(1).integers(0, 256, (3, *fitted.model.input_shape[1:]), np.uint8)
    expected = fitted.model(images).numpy()
    trainer.save(run, folder / "network.keras")
    loaded = trainer.load(folder / "network.keras")
    print(f"loaded: differs by {abs(loaded(images) - expected).max():.1g}")

    # Deployment: a SavedModel that TensorFlow alone can run, without this package.
    version, _ = trainer.export(run, "saved_model", directory=str(folder / "saved_models"))
    serve = tf.saved_model.load(str(version)).signatures["serving_default"]
    answers = serve(images=tf.constant(images))["probabilities"].numpy()
    print(f"exported: differs by {abs(answers - expected).max():.1g}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
