"""The result of `trainer gradient`: a table, a JSON document and a run directory.

runs/<UTC time>-gradient/
    gradient.json    all numbers
    tensorboard/     the table as text and, for an expression, the recorded graph
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import InputError
from trainer.run import make_directory, write_text


@dataclass(frozen=True, kw_only=True)
class GradientResult:
    """A comparison of gradients.

    Attributes:
        title: What was compared.
        passed: Whether the methods agree.
        verdict: A line that states whether and how well they agree.
        lines: The lines below the table; they include the verdict.
        table: Rows of column title and text.
        document: All numbers, for JSON.
        graph: The recorded operations, a tf.Graph; None for a network.
    """

    title: str
    passed: bool
    verdict: str
    lines: tuple[str, ...]
    table: list[dict[str, str]]
    document: dict[str, Any]
    graph: Any = field(default=None, repr=False)

    def write(self, runs: str) -> Path:
        """Writes the result to a new run directory.

        Args:
            runs: Folder that holds the run directories.

        Raises:
            InputError: The directory cannot be written.
        """
        import tensorflow as tf

        path = make_directory(runs, "gradient")
        rows = [self.table[0], dict.fromkeys(self.table[0], "---"), *self.table]
        rows = [list(self.table[0]), *(row.values() for row in rows[1:])]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        title, *lines = (f"`{line}`" for line in (self.title, *self.lines))
        try:
            write_text(path / "gradient.json", json.dumps(self.document, indent=2) + "\n")
            with tf.summary.create_file_writer(str(path / "tensorboard")).as_default(step=0):
                tf.summary.text("gradient", "\n\n".join((title, table, *lines)))
                if self.graph is not None:
                    tf.summary.graph(self.graph)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        return path


def to_json(value: Any) -> Any:
    """Returns arrays as lists, and None for a number that is not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
