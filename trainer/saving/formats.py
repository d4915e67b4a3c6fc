"""The export formats. This table drives export, load, verify and the benchmark."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.data import DataSpec, Images
from trainer.errors import InputError, did_you_mean, require_packages
from trainer.saving.file_signature import decode_file


@dataclass(frozen=True)
class ExportFormat:
    """One format. `runtimes.RUNTIMES` has the function that opens it."""

    name: str
    file: str  # name in the version folder; "." is the folder itself
    # Writes a float32 model. On the images, int8 measures the range of each value.
    write: Callable[[keras.Model, DataSpec, Images, Path], None]
    max_difference: float  # largest accepted difference of a probability from the float32 model
    packages: tuple[str, ...] = ()  # modules that the extra of this name installs


def find_format(name: str) -> ExportFormat:
    """Returns a format by its name.

    Raises:
        InputError: There is no such format.
        MissingError: A package that it needs is not installed.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}: {did_you_mean(name, FORMATS)}")
    require_packages(name, FORMATS[name].packages, extra=name.removesuffix("_int8"))
    return FORMATS[name]


def _write_saved_model(model: keras.Model, spec: DataSpec, _: Images, path: Path) -> None:
    """Writes a SavedModel with one signature for arrays and one for the bytes of image files."""
    pixels, how = tf.TensorSpec(spec.image_shape, tf.uint8), spec.preprocessing

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model(images, training=False)
        label = tf.argmax(probabilities, axis=-1)
        names = tf.gather(tf.constant(spec.class_names), label)
        return {"probabilities": probabilities, "class": label, "class_name": names}

    def classify_files(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        decode = partial(decode_file, how=how)  # type: ignore[arg-type]  # only if it is not None
        return classify(tf.map_fn(decode, image_bytes, fn_output_signature=pixels))

    archive = keras.export.ExportArchive()
    archive.track(model)
    images = tf.TensorSpec((None, *pixels.shape), tf.uint8, name="images")
    archive.add_endpoint("serving_default", classify, input_signature=[images])
    if how is not None:
        files = tf.TensorSpec((None,), tf.string, name="image_bytes")
        archive.add_endpoint("serving_files", classify_files, input_signature=[files])
    archive.write_out(str(path), verbose=False)


def _write_litert(
    model: keras.Model, spec: DataSpec, calibration: Images, path: Path, *, int8: bool = False
) -> None:
    # LiteRT lacks TensorFlow's own operations, which Keras would allow in the file.
    options: dict[str, Any] = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    if int8:
        batches = [{"images": image[np.newaxis]} for image in calibration]
        options["representative_dataset"] = tf.lite.RepresentativeDataset(lambda: iter(batches))
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
    _export(model, spec, calibration, path, format="litert", **options)


def _export(model: keras.Model, spec: DataSpec, _: Images, path: Path, **options: Any) -> None:
    """Exports with Keras, with an input `images` and an output `probabilities`."""
    images = keras.Input(spec.image_shape, dtype="uint8", name="images")
    named = keras.Model(images, {"probabilities": model(images, training=False)})
    signature = [tf.TensorSpec(images.shape, tf.uint8, name="images")]
    with warnings.catch_warnings(action="ignore"):  # about the code of the converters
        named.export(path, input_signature=signature, verbose=False, **options)


_write_int8 = partial(_write_litert, int8=True)
_write_onnx = partial(_export, format="onnx", opset_version=17)
# Another order of float32 sums changes a result by a few 1e-7 per layer. int8 has only 256 values
# per layer, so only its accuracy is limited.
MAX_POINTS_LOST = 0.3  # largest accepted loss of test accuracy, in percentage points
FORMATS = {
    each.name: each
    for each in (
        ExportFormat("saved_model", ".", _write_saved_model, 1e-5),
        ExportFormat("litert", "model.tflite", _write_litert, 1e-4, ("ai_edge_litert",)),
        ExportFormat("litert_int8", "model.tflite", _write_int8, 1.0, ("ai_edge_litert",)),
        ExportFormat("onnx", "model.onnx", _write_onnx, 1e-4, ("tf2onnx", "onnxruntime")),
    )
}
