"""Derivatives three ways (tape, symbols, differences), of an expression and of a network's loss."""

PUBLIC: dict[str, str] = {}
