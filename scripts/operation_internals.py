"""Uses of undocumented names of TensorFlow in allowed_operations.py."""

from typing import Any

# No public function returns the definition of an operation.
from tensorflow.python.framework import op_def_registry


def operation_definition(name: str) -> Any:
    """Returns TensorFlow's OpDef of an operation; None if there is no such operation."""
    return op_def_registry.get(name)
