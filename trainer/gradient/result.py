"""The result of `trainer gradient`: a table, a JSON document and a run directory.

runs/<UTC time>-gradient/
    gradient.json    all numbers
    tensorboard/     the table as text and, for an expression, the recorded graph
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import InputError
from trainer.files import write_text
from trainer.run import make_directory


@dataclass(frozen=True, kw_only=True)
class GradientResult:
    """A comparison of gradients.

    Attributes:
        title: What was compared.
        passed: Whether the methods agree.
        verdict: A line that states whether and how well they agree.
        notes: More lines.
        table: Rows of column title and text.
        numbers: Everything else for the JSON document.
        graph: The recorded operations, a tf.Graph; None for a network.
    """

    title: str
    passed: bool
    verdict: str
    notes: list[str]
    table: list[dict[str, str]]
    numbers: dict[str, Any]
    graph: Any = None

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document, with null for numbers that are not finite."""
        document: dict[str, Any] = _finite(self.numbers | {"notes": self.notes})
        return document

    def write(self, runs: str) -> Path:
        """Writes the result to a new run directory.

        Args:
            runs: Folder that holds the run directories.

        Raises:
            InputError: The directory cannot be written.
        """
        import tensorflow as tf

        path = make_directory(runs, "gradient")
        rows = [list(self.table[0]), ["---"] * len(self.table[0]), *map(dict.values, self.table)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        lines = "\n\n".join(f"`{line}`" for line in (self.title, self.verdict, *self.notes))
        try:
            write_text(path / "gradient.json", json.dumps(self.document, indent=2) + "\n")
            with tf.summary.create_file_writer(str(path / "tensorboard")).as_default(step=0):
                tf.summary.text("gradient", f"{table}\n\n{lines}")
                if self.graph is not None:
                    tf.summary.graph(self.graph)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value
