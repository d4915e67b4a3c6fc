"""Serves an exported SavedModel over HTTP with TensorFlow Serving's REST API."""

from typing import Final

PUBLIC: Final[dict[str, str]] = {}
