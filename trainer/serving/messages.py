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
from PIL import Image
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
    except (ValueError, RecursionError) as error:  # also raised for text that is not UTF-8
        raise HTTPException(400, f"JSON Parse error: {error}") from None
    _require(isinstance(document, dict), "expected a JSON object with 'instances' or 'inputs'")
    signature = document.get("signature_name", "")
    _require(isinstance(signature, str), "signature_name: expected a string")
    signature = signature or DEFAULT_SIGNATURE
    found = f"not found; available: {', '.join(sorted(signatures))}"
    _require(signature in signatures, f"Serving signature name: {signature!r} {found}")
    inputs = signatures[signature]
    forms = document.keys() & {"instances", "inputs"}
    received = " and ".join(sorted(forms)) or "neither"
    _require(len(forms) == 1, f"expected one of 'instances' and 'inputs', received {received}")
    (form,) = forms
    values = _columns(form, document[form], inputs)
    tensors = {name: _to_array(name, values[name], spec) for name, spec in inputs.items()}
    _check_images(tensors.get(IMAGE_FILES, np.empty(0)))
    return PredictRequest(signature, tensors, by_row=form == "instances")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HTTPException(400, message)


def _is_plain(value: Any) -> bool:
    """Returns whether a value stands for the only input of a function, without its name."""
    return not isinstance(value, dict) or value.keys() == {"b64"}


def _columns(form: str, value: Any, inputs: Inputs) -> Any:
    """Returns the values of each input from "instances", a list of rows, or from "inputs"."""
    by_row = form == "instances"
    rows = value if by_row else [value]
    _require(isinstance(rows, list) and len(rows) > 0, "instances: expected a list of at least one")
    if len(inputs) == 1 and _is_plain(rows[0]):
        return dict.fromkeys(inputs, value)
    for index, row in enumerate(rows):
        names = set() if _is_plain(row) else row.keys()
        # As in TensorFlow Serving, unknown names are ignored in "inputs" only.
        fits = names == inputs.keys() if by_row else names >= inputs.keys()
        received = "a plain value" if _is_plain(row) else ", ".join(row) or "none"
        where = f"instances[{index}]" if by_row else "inputs"
        _require(fits, f"{where}: expected {', '.join(inputs)}, received {received}")
    return {name: [row[name] for row in rows] for name in inputs} if by_row else value


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
    is_base64 = isinstance(value, dict) and isinstance(value.get("b64"), str)
    _require(is_base64, f'{name}: expected a string or {{"b64": "..."}}')
    text = "".join(value["b64"].split())
    content = text.rstrip("=")
    padded = content + "=" * (-len(content) % 4)
    _require(text in (content, padded), f"{name}: not base64: its padding has the wrong length")
    try:
        return base64.b64decode(padded, validate=True)
    except ValueError as error:
        raise HTTPException(400, f"{name}: not base64: {error}") from None


def _check_images(files: NDArray[Any]) -> None:
    """Refuses files that are not images, or whose headers declare too many pixels together."""
    expected = f"{IMAGE_FILES}: expected PNG or JPEG files with at most {_MAX_PIXELS} pixels in all"
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            images = [Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) for file in files.flat]
    except Exception as error:  # damaged headers raise many types
        raise HTTPException(400, f"{expected}: {type(error).__name__}") from None
    pixels = sum(image.width * image.height for image in images)
    _require(pixels <= _MAX_PIXELS, f"{expected}, received {pixels}")


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
