"""Requests and responses in the JSON format of TensorFlow Serving's REST API.

The format is described at https://www.tensorflow.org/tfx/serving/api_rest. Requests that do not
follow it raise starlette's HTTPException with status 400.
"""

import base64
import io
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.exceptions import HTTPException

from trainer.data import DataSpec
from trainer.images import FORMATS, Images, read_image
from trainer.preprocessing import Preprocessing

# Checked before decoding, because a few bytes of PNG can unpack to gigabytes.
_MAX_PIXELS = 4096 * 4096
# The signatures of an export, and their inputs.
_INPUTS = {"serving_default": "images", "serving_files": "image_bytes"}

Tensors = dict[str, NDArray[Any]]


def parse_request(body: bytes, spec: DataSpec) -> tuple[Images, bool]:
    """Parses the body of a `:predict` request.

    Args:
        body: JSON: {"signature_name": ..., "instances": [...]} or {..., "inputs": ...}.
        spec: The data that the model was trained on.

    Returns:
        The images, uint8 [n, height, width, channels], and True for "instances".

    Raises:
        HTTPException: The body is not such JSON, or does not contain such images.
        InputError: An image file is damaged.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:  # also raised for text that is not UTF-8
        raise HTTPException(400, f"JSON Parse error: {error}") from None
    _require(isinstance(document, dict), "expected a JSON object with 'instances' or 'inputs'")
    signature, how = document.get("signature_name") or "serving_default", spec.preprocessing
    known = list(_INPUTS)[: 1 if how is None else 2]
    _require(signature in known, f"signature_name: expected one of {known}, received {signature!r}")
    forms = [form for form in ("instances", "inputs") if form in document]
    _require(len(forms) == 1, f"expected one of 'instances' and 'inputs', received {forms}")
    by_row, name, values = forms == ["instances"], _INPUTS[signature], document[forms[0]]
    if not by_row:
        values = _by_name(values, name)
    _require(isinstance(values, list), f"{forms[0]}: expected a list")
    if by_row:
        values = [_by_name(value, name) for value in values]
    if signature == "serving_files" and how is not None:
        return _read_files(values, how), by_row
    return _to_images(values, spec.image_shape), by_row


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HTTPException(400, message)


def _by_name(value: Any, name: str) -> Any:
    """Returns the value of an input, which may have its name."""
    if not isinstance(value, dict) or value.keys() == {"b64"}:
        return value
    _require(name in value, f"expected a value for {name}, received {', '.join(value)}")
    return value[name]


def _to_images(values: list[Any], shape: tuple[int, int, int]) -> Images:
    """Makes an array from nested lists. No value is changed."""
    array = np.array(values, dtype=object)  # lists of unequal length remain as elements
    numbers = array.ravel().tolist()
    fits = array.shape[1:] == shape and numbers and set(map(type, numbers)) == {int}
    expected = f"images: expected whole numbers from 0 to 255 of shape {[None, *shape]}"
    _require(bool(fits) and min(numbers) >= 0 and max(numbers) <= 255, expected)
    return array.astype(np.uint8)


def _read_files(values: list[Any], how: Preprocessing) -> Images:
    """Reads image files as `predict` reads them, which knows more formats than TensorFlow.

    Files that are not images, or whose headers declare too many pixels together, are refused.
    """
    files = list(map(_to_bytes, values))
    expected = f"image_bytes: expected image files with at most {_MAX_PIXELS} pixels in all"
    try:
        images = [Image.open(io.BytesIO(file), formats=FORMATS) for file in files]
    except Exception as error:  # damaged headers raise many types
        raise HTTPException(400, f"{expected}: {type(error).__name__}") from None
    pixels = sum(math.prod(image.size) for image in images)
    _require(0 < pixels <= _MAX_PIXELS, f"{expected}, received {pixels}")
    return np.stack([read_image(file, how, "image_bytes")[0] for file in files])


def _to_bytes(value: Any) -> bytes:
    """Decodes {"b64": ...}.

    As in TensorFlow Serving, base64 may contain white space, and its padding is optional.
    """
    try:
        text = "".join(value["b64"].split()).rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = f'image_bytes: expected {{"b64": "an image file in base64"}}: {error}'
        raise HTTPException(400, message) from None


def render_response(outputs: Tensors, *, by_row: bool) -> dict[str, Any]:
    """Returns the body of a response, in the form of the request."""
    columns = {name: _to_json(array) for name, array in outputs.items()}
    if not by_row:
        return {"outputs": columns}
    rows = zip(*columns.values(), strict=True)
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}


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
