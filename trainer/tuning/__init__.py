"""Hyperparameter search: keras-tuner chooses the values, the training loop of this package runs."""

from typing import Final

PUBLIC: Final = {"tune": "trainer.tuning.search"}
