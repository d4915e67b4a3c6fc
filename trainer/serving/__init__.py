"""Serves an exported SavedModel over HTTP, with the REST interface of TensorFlow Serving."""

from typing import Final

PUBLIC: Final[dict[str, str]] = {}
