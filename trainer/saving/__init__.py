"""Saves, loads, exports and verifies models."""

from typing import Final

PUBLIC: Final = {
    "export": "trainer.saving.export",
    "load": "trainer.saving.loading",
    "save": "trainer.saving.loading",
    "verify": "trainer.saving.versions",
}
