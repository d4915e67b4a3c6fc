"""The export formats. This table drives export, load, verify and the benchmark."""

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import keras_objects
from trainer.data import DataSpec, Images
from trainer.errors import InputError, did_you_mean, require_packages
from trainer.saving.file_signature import decode_file
from trainer.saving.runtimes import RUNTIMES, Predict


@dataclass(frozen=True)
class ExportSource:
    """The input of an export."""

    model: keras.Model  # maps uint8 images to probabilities, in float32
    spec: DataSpec
    calibration: Images  # training images on which int8 measures the range of each value

    def signature(self) -> tf.TensorSpec:
        """Returns the input of the exported function: uint8 [n, height, width, channels]."""
        return tf.TensorSpec((None, *self.spec.image_shape), tf.uint8, name="images")


@dataclass(frozen=True)
class ExportFormat:
    """One format."""

    name: str
    file: str  # name in the version folder; "." is the folder itself
    write: Callable[[ExportSource, Path], None]
    max_difference: float  # largest accepted difference of a probability from the float32 model
    max_points_lost: float  # largest accepted loss of test accuracy, in percentage points
    packages: tuple[str, ...]  # required modules that are not dependencies of this package
    extra: str  # extra of this package that installs them

    def open(self, path: Path) -> Predict:
        """Opens an exported model (a file, or the folder of a SavedModel) with its runtime.

        Raises:
            InputError: The model is damaged or has another format.
        """
        try:
            return RUNTIMES[self.name][1](path)
        except Exception as error:  # each runtime raises its own errors
            reason = keras_objects.explain(error)
            raise InputError(f"{path} cannot be read as {self.name}: {reason}") from error


def find_format(name: str) -> ExportFormat:
    """Returns a format by its name.

    Raises:
        InputError: There is no such format.
        MissingError: A package that it needs is not installed.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}: {did_you_mean(name, FORMATS)}")
    require_packages(name, FORMATS[name].packages, extra=FORMATS[name].extra)
    return FORMATS[name]


def _write_saved_model(source: ExportSource, path: Path) -> None:
    """Writes a SavedModel with one signature for arrays and one for the bytes of image files."""
    model, spec = source.model, source.spec

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model(images, training=False)
        label = tf.argmax(probabilities, axis=-1)
        names = tf.gather(tf.constant(spec.class_names), label)
        return {"probabilities": probabilities, "class": label, "class_name": names}

    how = spec.preprocessing

    def classify_files(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels = tf.TensorSpec(spec.image_shape, tf.uint8)
        decode = partial(decode_file, how=how)
        return classify(tf.map_fn(decode, image_bytes, fn_output_signature=pixels))

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", classify, input_signature=[source.signature()])
    if how is not None:
        files = tf.TensorSpec((None,), tf.string, name="image_bytes")
        archive.add_endpoint("serving_files", classify_files, input_signature=[files])
    archive.write_out(str(path), verbose=False)


def _write_litert(source: ExportSource, path: Path, **options: Any) -> None:
    # LiteRT lacks TensorFlow's own operations, which Keras would allow in the file.
    builtins = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    _export("litert", source, path, target_spec=builtins, **options)


def _write_litert_int8(source: ExportSource, path: Path) -> None:
    dataset = tf.lite.RepresentativeDataset(
        lambda: ({"images": image[np.newaxis]} for image in source.calibration)
    )
    optimizations = [tf.lite.Optimize.DEFAULT]
    _write_litert(source, path, optimizations=optimizations, representative_dataset=dataset)


def _export(kind: str, source: ExportSource, path: Path, **options: Any) -> None:
    """Exports with Keras, with an input `images` and an output `probabilities`."""
    images = keras.Input(source.spec.image_shape, dtype="uint8", name="images")
    model = keras.Model(images, {"probabilities": source.model(images, training=False)})
    # The converters print every step and raise warnings about their own code.
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        signature = [source.signature()]
        model.export(path, format=kind, input_signature=signature, verbose=False, **options)


_write_onnx = partial(_export, "onnx", opset_version=17)
_LITERT = (("ai_edge_litert",), "litert")
_ONNX = (("tf2onnx", "onnxruntime"), "onnx")
# Another order of float32 sums changes a result by a few 1e-7 per layer. int8 has only 256 values
# per layer, so only its accuracy is limited.
FORMATS = {
    each.name: each
    for each in (
        ExportFormat("saved_model", ".", _write_saved_model, 1e-5, 0.02, (), ""),
        ExportFormat("litert", "model.tflite", _write_litert, 1e-4, 0.02, *_LITERT),
        ExportFormat("litert_int8", "model.tflite", _write_litert_int8, 1.0, 0.3, *_LITERT),
        ExportFormat("onnx", "model.onnx", _write_onnx, 1e-4, 0.02, *_ONNX),
    )
}
