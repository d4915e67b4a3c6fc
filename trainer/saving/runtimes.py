"""Opens exported models, each with its format's own runtime.

This file imports nothing of this package. As a program it makes the package impossible to import,
which proves that an artefact does not need it:

    python -P runtimes.py FORMAT PATH IMAGES.npy PROBABILITIES.npz

-P keeps this folder out of the path. PYTHONPATH and the packages of the user are found.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# From images, uint8 [n, height, width, channels], to probabilities, float32 [n, classes].
Predict = Callable[[Any], Any]


def open_saved_model(path: Path) -> Predict:
    """Opens a SavedModel folder with TensorFlow."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]

    def predict(images: Any) -> Any:
        return signature(images=tf.constant(images))["probabilities"].numpy()

    predict.loaded = loaded  # type: ignore[attr-defined]  # its variables live as long as it does
    return predict


def open_litert(path: Path) -> Predict:
    """Opens a .tflite file with LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    # Of itself it uses one thread: half the speed on two cores, for large batches.
    interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count())
    runner = interpreter.get_signature_runner("serving_default")
    return lambda images: runner(images=images)["probabilities"]


def open_onnx(path: Path) -> Predict:
    """Opens an .onnx file with ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


RUNTIMES: dict[str, Callable[[Path], Predict]] = {
    "saved_model": open_saved_model,
    "litert": open_litert,
    "litert_int8": open_litert,
    "onnx": open_onnx,
}


# What each runtime is imported as.
MODULES = {
    "saved_model": "tensorflow",
    "litert": "ai_edge_litert.interpreter",
    "litert_int8": "ai_edge_litert.interpreter",
    "onnx": "onnxruntime",
}


def predict_in_batches(predict: Predict, images: Any, size: int) -> Any:
    """Returns the probabilities of all images, so many at a time; the last batch may be smaller."""
    return np.concatenate(
        [predict(images[i : i + size]) for i in range(0, len(images), size)]
    ).astype(np.float32)


def main(kind: str, path: str, images_file: str, result_file: str) -> None:
    """Scores images at three batch sizes: a few at 1 and at 7, and all of them."""
    predict = RUNTIMES[kind](Path(path))
    images = np.load(images_file)
    np.savez(
        result_file,
        one=predict_in_batches(predict, images[:64], 1),
        seven=predict_in_batches(predict, images[:64], 7),
        all=predict_in_batches(predict, images, 256),
    )


if __name__ == "__main__":
    sys.modules["trainer"] = None  # type: ignore[assignment]  # importing it is an error from here
    main(*sys.argv[1:])
