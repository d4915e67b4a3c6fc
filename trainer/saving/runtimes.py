"""Opens exported models, each with the runtime of its format.

This module imports nothing from this package. Run as a program, it blocks the import of the
package. This proves that an exported model does not need it:

    python -P runtimes.py FORMAT PATH IMAGES.npy PROBABILITIES.npy

-P keeps the folder of this module out of the import path. PYTHONPATH and the packages of the user
are still found.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL_BATCHES = 64  # images that are also scored in batches of 1 and of 7
# Maps images, uint8 [n, height, width, channels], to probabilities, float32 [n, classes].
Predict = Callable[[Any], Any]


def open_saved_model(path: Path) -> Predict:
    """Opens a SavedModel folder with TensorFlow."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]

    def predict(images: Any, _loaded: Any = loaded) -> Any:  # keeps the variables alive
        return signature(images=tf.constant(images))["probabilities"].numpy()

    return predict


def open_litert(path: Path) -> Predict:
    """Opens a .tflite file with LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    # The default is one thread. On two cores, large batches then take twice as long.
    interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count())
    runner = interpreter.get_signature_runner("serving_default")
    return lambda images: runner(images=images)["probabilities"]


def open_onnx(path: Path) -> Predict:
    """Opens an .onnx file with ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def of_keras(model: Any) -> Predict:
    """Returns the predictions of a Keras model as such a function."""
    return lambda images: model(images, training=False).numpy()


# The module that each format imports, and the function that opens it.
RUNTIMES: dict[str, tuple[str, Callable[[Path], Predict]]] = {
    "saved_model": ("tensorflow", open_saved_model),
    "litert": ("ai_edge_litert.interpreter", open_litert),
    "litert_int8": ("ai_edge_litert.interpreter", open_litert),
    "onnx": ("onnxruntime", open_onnx),
}


def predict_in_batches(predict: Predict, images: Any, batch_size: int = 256) -> NDArray[np.float32]:
    """Returns the probabilities of all images. The last batch may be smaller."""
    starts = range(0, len(images), batch_size)
    return np.concatenate([predict(images[i : i + batch_size]) for i in starts], dtype=np.float32)


def main(kind: str, path: str, images_file: str, result_file: str) -> None:
    """Scores a few images in batches of 1, then of 7, and then all images in batches of 256."""
    predict = RUNTIMES[kind][1](Path(path))
    images = np.load(images_file)
    small = [predict_in_batches(predict, images[:SMALL_BATCHES], size) for size in (1, 7)]
    np.save(result_file, np.concatenate([*small, predict_in_batches(predict, images)]))


if __name__ == "__main__":
    sys.modules["trainer"] = None  # type: ignore[assignment]  # importing it now raises ImportError
    main(*sys.argv[1:])
