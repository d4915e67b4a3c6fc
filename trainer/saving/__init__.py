"""The life of a model after training: save, load, export, verify."""

from typing import Final

PUBLIC: Final = {
    "export": "trainer.saving.export",
    "load": "trainer.saving.loading",
    "save": "trainer.saving.files",
    "verify": "trainer.saving.export",
}
