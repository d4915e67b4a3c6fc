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

_MAX_DEPTH = 20  # of nested lists and dictionaries


def pack_state(thing: Any, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Returns the plain attributes of an object as JSON, by name.

    Args:
        thing: The object, for example a callback.
        arrays: Receives the arrays among the attributes, each under the SHA-256 of its content.
            States are therefore equal if their JSON is equal.
    """
    state = {}
    for name, value in vars(thing).items():
        with suppress(TypeError):
            if name not in CALLBACK_ATTRIBUTES:
                found: dict[str, NDArray[Any]] = {}
                state[name] = _pack(value, found, _MAX_DEPTH)
                arrays |= found
    return state


def unpack_state(state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Returns the attributes from the result of `pack_state`."""
    return {name: _unpack(value, arrays) for name, value in state.items()}


def lost_attributes(thing: Any, state: Mapping[str, Any]) -> list[str]:
    """Returns the names of the attributes that are missing in the packed state, sorted."""
    return sorted(vars(thing).keys() - state.keys() - {*CALLBACK_ATTRIBUTES})


def digest(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Returns the SHA-256 of arrays: of their names, types, shapes and values."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.digest()


def _pack(value: Any, arrays: dict[str, NDArray[Any]], depth: int) -> Any:
    """Returns a plain value as JSON.

    Raises:
        TypeError: It is not plain, or nested too deeply.
    """
    if depth == 0:
        raise TypeError("nested too deeply")
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
        array = np.array(value)
        key = digest({"": array}).hex()
        arrays[key] = array
        return {"scalar" if isinstance(value, np.generic) else "array": key}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_pack(item, arrays, depth - 1) for item in value]}
    if type(value) is dict:
        pairs = value.items()
        return {"dict": [[_pack(part, arrays, depth - 1) for part in pair] for pair in pairs]}
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
    if kind == "array":
        return arrays[content]
    if kind == "scalar":
        return arrays[content][()]
    if kind == "operation":
        return getattr(keras.ops, content)
    if kind == "dict":
        return {_unpack(key, arrays): _unpack(value, arrays) for key, value in content}
    items = [_unpack(item, arrays) for item in content]
    return items if kind == "list" else tuple(items)
