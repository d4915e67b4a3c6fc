"""The formats a model is exported to: one table for exporting, loading, verifying and measuring."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainer import keras_objects
from trainer.data import DataSpec, Images
from trainer.errors import InputError, did_you_mean, require_packages
from trainer.saving.runtimes import RUNTIMES, Predict

Probabilities = NDArray[np.float32]
FILE_CHANNELS = (1, 3, 4)  # what image files have: for others there is no serving_files


@dataclass(frozen=True)
class Source:
    """What an artefact is made from.

    Attributes:
        model: In float32: from images (uint8) to probabilities.
        spec: Of the data.
        calibration: Training images by which int8 finds the ranges of its values.
    """

    model: keras.Model
    spec: DataSpec
    calibration: Images


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: As the command takes it.
        file: Name of the artefact within a version's folder; "." is the folder itself.
        write: Makes the artefact.
        tolerance: The largest difference of a probability from the model's that is accepted.
        points: The largest loss of test accuracy that is accepted, in percentage points.
        packages: Modules that it needs, which are no dependency of this package.
        extra: Brings them.
    """

    name: str
    file: str
    write: Callable[[Source, Path], None]
    tolerance: float
    points: float
    packages: tuple[str, ...] = ()
    extra: str = ""

    def open(self, path: Path) -> Predict:
        """Opens an artefact with the format's own runtime.

        Args:
            path: The artefact: a folder for a SavedModel, else a file.

        Raises:
            InputError: It is damaged, or of another format.
            MissingError: The runtime is not installed.
        """
        self.require()
        try:
            return RUNTIMES[self.name](path)
        except Exception as error:
            # Each runtime has errors of its own, some of them plain RuntimeError.
            reason = keras_objects.explain(error)
            raise InputError(f"{path} cannot be read as {self.name}: {reason}") from error

    def require(self) -> None:
        """Raises MissingError where a package that the format needs is not installed."""
        require_packages(self.name, self.packages, extra=self.extra)


def find_format(name: str) -> Format:
    """Returns a format by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}: {did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def _images_function(source: Source) -> Any:
    """Returns the function of images alone, which every runtime can compute."""
    spec = tf.TensorSpec((None, *source.spec.image_shape), tf.uint8, name="images")

    @tf.function(input_signature=[spec])
    def probabilities(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": source.model(images, training=False)}

    return probabilities


def _write_saved_model(source: Source, path: Path) -> None:
    """Writes signatures for arrays and for the bytes of image files, as a server takes them."""
    model, spec = source.model, source.spec
    height, width, channels = spec.image_shape

    def answer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model(images, training=False)
        label = tf.argmax(probabilities, axis=-1)
        names = tf.gather(tf.constant(spec.class_names), label)
        return {"probabilities": probabilities, "class": label, "class_name": names}

    def decode(encoded: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        image = tf.image.resize(image, (height, width), antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    def answer_files(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels = tf.TensorSpec((height, width, channels), tf.uint8)
        return answer(tf.map_fn(decode, image_bytes, fn_output_signature=pixels))

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serving_default",
        answer,
        input_signature=[tf.TensorSpec((None, *spec.image_shape), tf.uint8, name="images")],
    )
    if channels in FILE_CHANNELS:
        archive.add_endpoint(
            "serving_files",
            answer_files,
            input_signature=[tf.TensorSpec((None,), tf.string, name="image_bytes")],
        )
    archive.write_out(str(path), verbose=False)


def _write_litert(source: Source, path: Path) -> None:
    path.write_bytes(_converted(source))


def _write_litert_int8(source: Source, path: Path) -> None:
    def representative() -> Any:
        for image in source.calibration:
            yield {"images": image[np.newaxis]}

    path.write_bytes(
        _converted(
            source,
            optimizations=[tf.lite.Optimize.DEFAULT],
            representative_dataset=tf.lite.RepresentativeDataset(representative),
        )
    )


def _converted(source: Source, **options: Any) -> bytes:
    """Converts by way of a SavedModel, as Keras does."""
    archive = keras.export.ExportArchive()
    archive.track(source.model)
    function = _images_function(source)
    archive.add_endpoint("serving_default", function)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        for name, value in options.items():
            setattr(converter, name, value)
        content: bytes = converter.convert()
    return content


def _write_onnx(source: Source, path: Path) -> None:
    function = _images_function(source)
    with _quiet():
        import tf2onnx
        from keras.src.export.tf2onnx_lib import patch_tf2onnx

        patch_tf2onnx()  # as Keras itself does: tf2onnx 1.17 does not know numpy 2
        tf2onnx.convert.from_function(
            function,
            input_signature=function.input_signature,
            opset=17,
            output_path=str(path),
        )


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps the converters from telling every step on stdout and in warnings of their own code."""
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


# Tolerances: float32 sums in another order differ by a few 1e-7 a layer. int8 keeps 256 values a
# layer, so it is judged by its accuracy.
FORMATS = {
    each.name: each
    for each in (
        Format("saved_model", ".", _write_saved_model, tolerance=1e-5, points=0.02),
        Format(
            *("litert", "model.tflite", _write_litert),
            tolerance=1e-4,
            points=0.02,
            packages=("ai_edge_litert",),
            extra="litert",
        ),
        Format(
            *("litert_int8", "model.tflite", _write_litert_int8),
            tolerance=1.0,
            points=0.3,
            packages=("ai_edge_litert",),
            extra="litert",
        ),
        Format(
            *("onnx", "model.onnx", _write_onnx),
            tolerance=1e-4,
            points=0.02,
            packages=("tf2onnx", "onnxruntime"),
            extra="onnx",
        ),
    )
}
