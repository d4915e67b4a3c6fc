"""Serves an exported SavedModel over HTTP, with the REST interface of TensorFlow Serving."""
