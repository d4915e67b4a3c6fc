"""Measures this machine: matrix products, operations, training steps and export formats."""

PUBLIC: dict[str, str] = {}
