"""The state of callbacks in a checkpoint: their plain attributes, as JSON and arrays.

Plain values are None, numbers, strings, NumPy arrays and scalars, functions of keras.ops (Keras's
callbacks store one to compare metrics), and lists, tuples and dictionaries of these.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainer.keras_internals import CALLBACK_ATTRIBUTES


def pack_state(thing: Any, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Returns the plain attributes of an object, for example a callback, as JSON by name.

    `arrays` receives the arrays among them, each under the SHA-256 of its content. States are
    therefore equal if their JSON is equal.
    """
    state = {}
    for name in sorted(vars(thing).keys() - {*CALLBACK_ATTRIBUTES}):
        with suppress(TypeError, RecursionError):  # not plain, or nested in itself
            state[name] = _pack(vars(thing)[name], arrays)
    return state


def unpack_state(state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Returns the attributes from the result of `pack_state`."""
    return {name: _unpack(value, arrays) for name, value in state.items()}


def _pack(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """Returns a plain value as JSON. Raises TypeError if it is not plain."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
        array = np.asarray(value)
        content = f"{array.dtype} {array.shape}".encode() + array.tobytes()
        key = hashlib.sha256(content).hexdigest()
        arrays[key] = array
        return {"scalar" if isinstance(value, np.generic) else "array": key}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_pack(item, arrays) for item in value]}
    if type(value) is dict:
        return {"dict": [[_pack(key, arrays), _pack(item, arrays)] for key, item in value.items()]}
    name = getattr(value, "__name__", "")
    if callable(value) and getattr(keras.ops, name, None) is value:
        return {"operation": name}
    if type(value) in (type(None), bool, int, float, str):
        return value
    raise TypeError(f"{type(value).__name__} is not plain")


def _unpack(tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind in ("array", "scalar"):
        return arrays[content] if kind == "array" else arrays[content][()]
    if kind == "operation":
        return getattr(keras.ops, content)
    if kind == "dict":
        return {_unpack(key, arrays): _unpack(value, arrays) for key, value in content}
    items = [_unpack(item, arrays) for item in content]
    return items if kind == "list" else tuple(items)
