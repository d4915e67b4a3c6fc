"""Requests and responses in the JSON format of TensorFlow Serving's REST API.

The format is described at https://www.tensorflow.org/tfx/serving/api_rest. Requests that do not
follow it raise starlette's HTTPException with status 400.
"""

import base64
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image
from starlette.exceptions import HTTPException

from trainer.images import FORMATS

# Checked before decoding, because a few bytes of PNG can unpack to gigabytes.
_MAX_PIXELS = 4096 * 4096

Inputs = Mapping[str, tf.TensorSpec]
Tensors = dict[str, NDArray[Any]]


def parse_request(body: bytes, signatures: Mapping[str, Inputs]) -> tuple[str, Tensors, bool]:
    """Parses the body of a `:predict` request.

    Args:
        body: JSON: {"signature_name": ..., "instances": [...]} or {..., "inputs": ...}.
        signatures: The inputs of each available function.

    Returns:
        The name of the function to call, its inputs, and True for "instances".

    Raises:
        HTTPException: The body is not such JSON, or does not fit the function.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:  # also raised for text that is not UTF-8
        raise HTTPException(400, f"JSON Parse error: {error}") from None
    _require(isinstance(document, dict), "expected a JSON object with 'instances' or 'inputs'")
    signature = document.get("signature_name") or "serving_default"
    names = sorted(signatures)
    _require(signature in names, f"signature_name: expected one of {names}, received {signature!r}")
    forms = [form for form in ("instances", "inputs") if form in document]
    _require(len(forms) == 1, f"expected one of 'instances' and 'inputs', received {forms}")
    inputs, by_row = signatures[signature], "instances" in forms
    values = _by_name(document[forms[0]], inputs, by_row=by_row)
    tensors = {name: _to_array(name, values[name], spec) for name, spec in inputs.items()}
    # The input of image files in the exports of this project.
    _check_images(tensors.get("image_bytes", np.empty(0)))
    return signature, tensors, by_row


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HTTPException(400, message)


def _by_name(value: Any, inputs: Inputs, *, by_row: bool) -> Any:
    """Returns the values of each input from "instances", a list of rows, or from "inputs"."""
    rows = value if by_row else [value]
    _require(isinstance(rows, list) and len(rows) > 0, "instances: expected a list of at least one")
    named = isinstance(rows[0], dict) and rows[0].keys() != {"b64"}
    if len(inputs) == 1 and not named:
        return dict.fromkeys(inputs, value)
    for row in rows:
        received = ", ".join(row) if isinstance(row, dict) else "no names"
        fits = isinstance(row, dict) and row.keys() >= inputs.keys()
        _require(fits, f"expected a value for each of {', '.join(inputs)}, received {received}")
    return {name: [row[name] for row in rows] for name in inputs} if by_row else value


def _to_array(name: str, value: Any, spec: tf.TensorSpec) -> NDArray[Any]:
    """Makes an array from nested lists that fit a specification. No value is changed."""
    array = np.array(value, dtype=object)  # lists of unequal length remain as elements
    values, dtype = array.ravel().tolist(), spec.dtype
    numbers = {bool} if dtype.is_bool else {int, float} if dtype.is_floating else {int}
    accepted = {str, dict} if dtype == tf.string else numbers
    types = set(map(type, values))
    fits = spec.shape.is_compatible_with(array.shape) and 0 not in array.shape
    expected = f"{name}: expected {spec.shape} of {dtype.name}"
    received = " and ".join(sorted(each.__name__ for each in types)) or "nothing"
    _require(fits and types <= accepted, f"{expected}, received {array.shape} of {received}")
    if dtype == tf.string:
        return np.array([_to_bytes(name, each) for each in values], object).reshape(array.shape)
    try:
        with np.errstate(over="raise"):
            return np.array(values, dtype.as_numpy_dtype).reshape(array.shape)
    except (OverflowError, FloatingPointError):
        raise HTTPException(400, f"{expected}, and a number is out of range") from None


def _to_bytes(name: str, value: Any) -> bytes:
    """Returns a string as UTF-8, or decodes {"b64": ...}.

    As in TensorFlow Serving, base64 may contain white space, and its padding is optional.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    try:
        text = "".join(value["b64"].split()).rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (KeyError, AttributeError, ValueError) as error:
        message = f'{name}: expected a string or {{"b64": "text in base64"}}: {error}'
        raise HTTPException(400, message) from None


def _check_images(files: NDArray[Any]) -> None:
    """Refuses files that are not images, or whose headers declare too many pixels together."""
    expected = f"image_bytes: expected image files with at most {_MAX_PIXELS} pixels in all"
    try:
        images = [Image.open(io.BytesIO(file), formats=FORMATS) for file in files.flat]
    except Exception as error:  # damaged headers raise many types
        raise HTTPException(400, f"{expected}: {type(error).__name__}") from None
    pixels = sum(math.prod(image.size) for image in images)
    _require(pixels <= _MAX_PIXELS, f"{expected}, received {pixels}")


def render_response(outputs: Tensors, *, by_row: bool) -> dict[str, Any]:
    """Returns the body of a response, in the form of the request."""
    content: Any = {name: _to_json(array) for name, array in outputs.items()}
    if len(outputs) == 1:
        (content,) = content.values()
    elif by_row:
        rows = zip(*content.values(), strict=True)
        content = [dict(zip(outputs, row, strict=True)) for row in rows]
    return {"predictions" if by_row else "outputs": content}


def _to_json(array: NDArray[Any]) -> Any:
    """Returns nested lists of plain values. Bytes become text."""
    if array.dtype == np.float32:
        # float64 would print 0.10000000149011612 for 0.1. These are the shortest texts that read
        # back to the same float32. A few, such as 7.038531e-26, do not if read as float64.
        shortest = array.astype(str).astype(np.float64)
        return np.where(shortest.astype(np.float32) == array, shortest, array).tolist()
    if array.dtype == object:
        array = np.frompyfunc(bytes.decode, 1, 1)(array)
    return array.tolist()
