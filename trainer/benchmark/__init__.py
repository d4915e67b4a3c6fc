"""Measures this machine: matrix products, operations, training steps and exported formats."""
