"""The search for better settings: keras-tuner chooses, this project's own loop trains."""

from typing import Final

PUBLIC: Final = {"tune": "trainer.tuning.search"}
