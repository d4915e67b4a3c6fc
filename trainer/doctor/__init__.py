"""Reports what this machine can do, and how to change what it cannot."""

from typing import Final

# The doctor has a verb only.
PUBLIC: Final[dict[str, str]] = {}
