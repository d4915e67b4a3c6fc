"""Derivatives three ways (tape, symbols, differences), of an expression and of a network's loss."""

from typing import Final

PUBLIC: Final[dict[str, str]] = {}
