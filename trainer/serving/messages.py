"""Requests and answers in the JSON shapes of TensorFlow Serving's REST interface.

They are described at https://www.tensorflow.org/tfx/serving/api_rest.
"""

import base64
import io
import json
import string
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

DEFAULT_SIGNATURE = "serving_default"
# Inputs of this name are image files, as `trainer export` makes them.
IMAGE_FILES = "image_bytes"
# Images of more are refused before they are decoded: some bytes of PNG can unpack to gigabytes.
_MOST_PIXELS = 4096 * 4096

Inputs = Mapping[str, tf.TensorSpec]
Tensors = dict[str, NDArray[Any]]


class RequestError(Exception):
    """A request that cannot be answered; `status` is that of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        """Takes the status and what the body's "error" says."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Call:
    """What a request asks for.

    Attributes:
        signature: Name of the function to call.
        tensors: Its inputs.
        by_row: Whether they came as "instances" (a row each) instead of "inputs" (whole columns);
            the answer has the same form.
    """

    signature: str
    tensors: Tensors
    by_row: bool


def parse_request(body: bytes, signatures: Mapping[str, Inputs]) -> Call:
    """Reads the body of a `:predict` request.

    Args:
        body: JSON: {"signature_name": ..., "instances": [...]} or {..., "inputs": ...}.
        signatures: The inputs of each function there is.

    Raises:
        RequestError: It is no such JSON, or its tensors do not fit the function; status 400.
    """
    document = _document(body)
    signature = document.get("signature_name", "")
    if not isinstance(signature, str):
        raise RequestError(400, "signature_name: expected a string")
    signature = signature or DEFAULT_SIGNATURE
    if signature not in signatures:
        known = ", ".join(sorted(signatures))
        raise RequestError(
            400, f"Serving signature name: {signature!r} not found; available: {known}"
        )
    inputs = signatures[signature]
    given = [key for key in ("instances", "inputs") if key in document]
    if len(given) != 1:
        received = "both" if given else "neither"
        raise RequestError(400, f"expected one of 'instances' and 'inputs', received {received}")
    by_row = given == ["instances"]
    columns = (_columns if by_row else _named)(document[given[0]], inputs)
    tensors = {name: _tensor(name, columns[name], spec) for name, spec in inputs.items()}
    if sum(map(_count_pixels, tensors.get(IMAGE_FILES, np.empty(0)).flat)) > _MOST_PIXELS:
        raise RequestError(
            400, f"{IMAGE_FILES}: more than {_MOST_PIXELS} pixels in the images of one request"
        )
    return Call(signature, tensors, by_row)


def render_answer(outputs: Tensors, *, by_row: bool) -> dict[str, Any]:
    """Returns the body of an answer: a row for each instance, or whole columns.

    Args:
        outputs: Of the function.
        by_row: In which form the request came.
    """
    values = {name: _plain(name, array) for name, array in outputs.items()}
    if len(values) == 1:
        (only,) = values.values()
        return {"predictions" if by_row else "outputs": only}
    if not by_row:
        return {"outputs": values}
    rows = zip(*values.values(), strict=True)
    return {"predictions": [dict(zip(values, row, strict=True)) for row in rows]}


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except RecursionError:
        raise RequestError(400, "JSON Parse error: nested too deeply") from None
    except ValueError as error:  # also of text that is not UTF-8
        raise RequestError(400, f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise RequestError(400, "expected a JSON object with 'instances' or 'inputs'")
    return document


def _is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _columns(instances: Any, inputs: Inputs) -> dict[str, list[Any]]:
    """Turns rows into columns: plain values for a single input, else objects by name."""
    if not isinstance(instances, list) or not instances:
        raise RequestError(400, "instances: expected a list of at least one")
    named = isinstance(instances[0], dict) and not _is_bytes(instances[0])
    if not named:
        if len(inputs) != 1:
            raise RequestError(400, f"instances: expected objects with {', '.join(inputs)}")
        return {next(iter(inputs)): instances}
    for index, instance in enumerate(instances):
        if not isinstance(instance, dict) or instance.keys() != inputs.keys():
            received = ", ".join(instance) if isinstance(instance, dict) else "a plain value"
            raise RequestError(
                400, f"instances[{index}]: expected {', '.join(inputs)}, received {received}"
            )
    return {name: [instance[name] for instance in instances] for name in inputs}


def _named(values: Any, inputs: Inputs) -> dict[str, Any]:
    """Returns columns by name; a plain value is that of the single input.

    Other keys are ignored, as TensorFlow Serving does here, but not in "instances".
    """
    if not isinstance(values, dict) or _is_bytes(values):
        if len(inputs) != 1:
            raise RequestError(400, f"inputs: expected an object with {', '.join(inputs)}")
        return {next(iter(inputs)): values}
    if not values.keys() >= inputs.keys():
        raise RequestError(
            400, f"inputs: expected {', '.join(inputs)}, received {', '.join(values) or 'none'}"
        )
    return values


def _tensor(name: str, value: Any, spec: tf.TensorSpec) -> NDArray[Any]:
    """Makes an array of nested lists that fit a specification."""
    shape = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        first = first[0] if first else None
    if not spec.shape.is_compatible_with(shape) or 0 in shape:
        sizes = ", ".join("n" if size is None else str(size) for size in spec.shape)
        raise RequestError(400, f"{name}: expected {spec.dtype.name} [{sizes}], received {shape}")
    level = [value]
    for size in shape:
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise RequestError(400, f"{name}: its lists differ in length: the first are {shape}")
        level = list(chain.from_iterable(level))
    return _values(name, level, spec.dtype).reshape(shape)


def _values(name: str, values: list[Any], dtype: tf.DType) -> NDArray[Any]:
    """Makes an array of numbers, truth values or strings, without changing any of them."""
    if dtype == tf.string:
        return np.array([_string(name, value) for value in values], dtype=object)
    accepted: set[type] = {bool} if dtype.is_bool else {int}
    if dtype.is_floating:
        accepted |= {float}
    received = set(map(type, values)) - accepted
    if received:
        words = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
        odd = received.pop()
        raise RequestError(
            400, f"{name}: expected {dtype.name}, received {words.get(odd, odd.__name__)}"
        )
    try:
        with np.errstate(over="raise"):
            return np.array(values, dtype=dtype.as_numpy_dtype)
    except (OverflowError, FloatingPointError):
        raise RequestError(400, f"{name}: a number is out of the range of {dtype.name}") from None


def _string(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if not _is_bytes(value):
        raise RequestError(400, f'{name}: expected a string or {{"b64": "..."}}')
    try:
        return _decode_base64(value["b64"])
    except ValueError as error:
        raise RequestError(400, f"{name}: no base64: {error}") from None


def _decode_base64(text: str) -> bytes:
    """Decodes base64 as TensorFlow Serving does: with any white space, padding is optional.

    Raises:
        ValueError: The text is not base64.
    """
    encoded = text.encode("ascii").translate(None, string.whitespace.encode())
    content = encoded.rstrip(b"=")
    padded = content + b"=" * (-len(content) % 4)
    if encoded not in (content, padded):
        raise ValueError("its padding has the wrong length")
    return base64.b64decode(padded, validate=True)


def _count_pixels(file: bytes) -> int:
    """Returns how many pixels the head of an image file says it has."""
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as image,
        ):
            if image.mode == "CMYK":
                raise RequestError(400, f"{IMAGE_FILES}: expected grey or RGB, received CMYK")
            return int(image.width * image.height)
    except Image.DecompressionBombError:
        return _MOST_PIXELS + 1
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise RequestError(400, f"{IMAGE_FILES}: expected PNG or JPEG files{reason}") from None


def _shortest(array: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns float64 numbers whose JSON is the shortest text that reads back to the same float32.

    For example 0.1, where float64 would be 0.10000000149011612.
    """
    shortest = array.astype(str).astype(np.float64)
    # A few short texts, such as 7.038531e-26, read back to a neighbour by way of float64.
    return np.where(shortest.astype(np.float32) == array, shortest, array.astype(np.float64))


def _plain(name: str, array: NDArray[Any]) -> Any:
    """Returns nested lists of plain values; bytes as TensorFlow Serving writes them."""
    if array.dtype == np.float32:
        return _shortest(array).tolist()
    if array.dtype != object:
        return array.tolist()
    if name.endswith("_bytes"):
        encode: Any = lambda value: {"b64": base64.b64encode(value).decode()}  # noqa: E731
    else:
        encode = lambda value: value.decode(errors="replace")  # noqa: E731
    return np.frompyfunc(encode, 1, 1)(array).tolist()
