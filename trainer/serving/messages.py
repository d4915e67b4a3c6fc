"""Requests and responses in the JSON format of TensorFlow Serving's REST API.

The format is described at https://www.tensorflow.org/tfx/serving/api_rest. Requests that do not
follow it raise starlette's HTTPException with status 400.
"""

import base64
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from starlette.exceptions import HTTPException

DEFAULT_SIGNATURE = "serving_default"
IMAGE_FILES = "image_bytes"  # the input of image files in the exports of this project
# Checked before decoding, because a few bytes of PNG can unpack to gigabytes.
_MAX_PIXELS = 4096 * 4096
_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", type(None): "null"}

Inputs = Mapping[str, tf.TensorSpec]
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PredictRequest:
    """The parsed body of a `:predict` request."""

    signature: str  # name of the function to call
    tensors: Tensors  # its inputs
    by_row: bool  # True for "instances", False for "inputs"; the response has the same form


def parse_request(body: bytes, signatures: Mapping[str, Inputs]) -> PredictRequest:
    """Parses the body of a `:predict` request.

    Args:
        body: JSON: {"signature_name": ..., "instances": [...]} or {..., "inputs": ...}.
        signatures: The inputs of each available function.

    Raises:
        HTTPException: The body is not such JSON, or does not fit the function.
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise HTTPException(400, "JSON Parse error: nested too deeply") from None
    except ValueError as error:  # also raised for text that is not UTF-8
        raise HTTPException(400, f"JSON Parse error: {error}") from None
    _require(isinstance(document, dict), "expected a JSON object with 'instances' or 'inputs'")
    signature = document.get("signature_name", "")
    _require(isinstance(signature, str), "signature_name: expected a string")
    inputs = signatures.get(signature or DEFAULT_SIGNATURE)
    if inputs is None:
        available = ", ".join(sorted(signatures))
        message = f"Serving signature name: {signature!r} not found; available: {available}"
        raise HTTPException(400, message)
    by_row = "instances" in document
    received = "both" if by_row else "neither"
    expected = f"expected one of 'instances' and 'inputs', received {received}"
    _require(by_row != ("inputs" in document), expected)
    if by_row:
        values = _parse_instances(document["instances"], inputs)
    else:
        values = _parse_inputs(document["inputs"], inputs)
    tensors = {name: _to_array(name, values[name], spec) for name, spec in inputs.items()}
    _check_images(tensors.get(IMAGE_FILES, np.empty(0)))
    return PredictRequest(signature or DEFAULT_SIGNATURE, tensors, by_row)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HTTPException(400, message)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _parse_instances(rows: Any, inputs: Inputs) -> dict[str, Any]:
    """Returns the values of each input. A row is an object, or a plain value for one input."""
    expected = ", ".join(inputs)
    _require(isinstance(rows, list) and len(rows) > 0, "instances: expected a list of at least one")
    if not isinstance(rows[0], dict) or _is_base64(rows[0]):
        _require(len(inputs) == 1, f"instances: expected objects with {expected}")
        return {expected: rows}
    for index, row in enumerate(rows):
        received = ", ".join(row) if isinstance(row, dict) else "a plain value"
        fits = isinstance(row, dict) and row.keys() == inputs.keys()
        _require(fits, f"instances[{index}]: expected {expected}, received {received}")
    return {name: [row[name] for row in rows] for name in inputs}


def _parse_inputs(values: Any, inputs: Inputs) -> dict[str, Any]:
    """Returns the values of each input. Unknown keys are ignored here, as in TensorFlow Serving."""
    expected = ", ".join(inputs)
    if not isinstance(values, dict) or _is_base64(values):
        _require(len(inputs) == 1, f"inputs: expected an object with {expected}")
        return {expected: values}
    received = ", ".join(values) or "none"
    _require(values.keys() >= inputs.keys(), f"inputs: expected {expected}, received {received}")
    return values


def _to_array(name: str, value: Any, spec: tf.TensorSpec) -> NDArray[Any]:
    """Makes an array from nested lists that fit a specification. No value is changed."""
    array = np.array(value, dtype=object)  # lists of unequal length remain as elements
    values, shape, dtype = array.ravel().tolist(), list(array.shape), spec.dtype
    types = set(map(type, values))
    _require(list not in types, f"{name}: its lists differ in length: the first are {shape}")
    sizes = ", ".join("n" if size is None else str(size) for size in spec.shape)
    fits = spec.shape.is_compatible_with(shape) and 0 not in shape
    _require(fits, f"{name}: expected {dtype.name} [{sizes}], received {shape}")
    if dtype == tf.string:
        return np.array([_to_bytes(name, each) for each in values], object).reshape(shape)
    accepted = {bool} if dtype.is_bool else {int, float} if dtype.is_floating else {int}
    for wrong in types - accepted:
        received = _JSON_TYPES.get(wrong, wrong.__name__)
        raise HTTPException(400, f"{name}: expected {dtype.name}, received {received}")
    try:
        with np.errstate(over="raise"):
            return np.array(values, dtype.as_numpy_dtype).reshape(shape)
    except (OverflowError, FloatingPointError):
        raise HTTPException(400, f"{name}: a number is out of the range of {dtype.name}") from None


def _to_bytes(name: str, value: Any) -> bytes:
    """Returns a string as UTF-8, or decodes {"b64": ...}.

    As in TensorFlow Serving, base64 may contain white space, and its padding is optional.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    _require(_is_base64(value), f'{name}: expected a string or {{"b64": "..."}}')
    encoded = "".join(value["b64"].split())
    content = encoded.rstrip("=")
    padded = content + "=" * (-len(content) % 4)
    _require(encoded in (content, padded), f"{name}: not base64: its padding has the wrong length")
    try:
        return base64.b64decode(padded, validate=True)
    except ValueError as error:
        raise HTTPException(400, f"{name}: not base64: {error}") from None


def _check_images(files: NDArray[Any]) -> None:
    """Refuses files that are not images, or whose headers declare too many pixels together."""
    pixels = 0
    for file in files.flat:
        try:
            with (
                warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
                Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image,
            ):
                pixels += image.width * image.height
        except Image.DecompressionBombError:
            pixels = _MAX_PIXELS + 1
        except (OSError, SyntaxError, ValueError) as error:
            reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
            message = f"{IMAGE_FILES}: expected PNG or JPEG files{reason}"
            raise HTTPException(400, message) from None
    message = f"{IMAGE_FILES}: more than {_MAX_PIXELS} pixels in the images of one request"
    _require(pixels <= _MAX_PIXELS, message)


def render_response(outputs: Tensors, *, by_row: bool) -> dict[str, Any]:
    """Returns the body of a response, in the form of the request."""
    values = {name: _to_json(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        (only,) = values.values()
        return {"predictions" if by_row else "outputs": only}
    if not by_row:
        return {"outputs": values}
    rows = zip(*values.values(), strict=True)
    return {"predictions": [dict(zip(values, row, strict=True)) for row in rows]}


def _to_json(name: str, array: NDArray[Any]) -> Any:
    """Returns nested lists of plain values. Bytes become text, or {"b64": ...} if so named."""
    if array.dtype == np.float32:
        # float64 would print 0.10000000149011612 for 0.1. These are the shortest texts that read
        # back to the same float32. A few, such as 7.038531e-26, do not if read as float64.
        shortest = array.astype(str).astype(np.float64)
        return np.where(shortest.astype(np.float32) == array, shortest, array).tolist()
    if array.dtype != object:
        return array.tolist()

    def decode(value: bytes) -> Any:
        if name.endswith("_bytes"):
            return {"b64": base64.b64encode(value).decode()}
        return value.decode(errors="replace")

    return np.frompyfunc(decode, 1, 1)(array).tolist()
