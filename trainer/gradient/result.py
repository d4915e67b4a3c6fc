"""The result of `trainer gradient`: a table, a JSON document and a run directory.

runs/<UTC time>-gradient/
    gradient.json    all numbers
    tensorboard/     the table as text and, for an expression, the recorded graph
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.files import write_text
from trainer.run import make_directory


@dataclass(frozen=True, kw_only=True)
class GradientResult:
    """A comparison of gradients.

    Attributes:
        title: What was compared.
        passed: Whether the methods agree.
        verdict: A line that states whether and how well they agree.
        table: Rows of column title and text.
        document: The JSON document. "notes" are more lines.
        graph: The recorded operations, a tf.Graph; None for a network.
    """

    title: str
    passed: bool
    verdict: str
    table: list[dict[str, str]]
    document: dict[str, Any]
    graph: Any = None

    def write(self, runs: str) -> Path:
        """Writes the result to a new run directory in the folder `runs`, and returns its path."""
        import tensorflow as tf

        path = make_directory(runs, "gradient")
        write_text(path / "gradient.json", json.dumps(self.document, indent=2) + "\n")
        rows = [list(self.table[0]), ["---"] * len(self.table[0]), *map(dict.values, self.table)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        lines = (f"`{line}`" for line in (self.title, self.verdict, *self.document["notes"]))
        with tf.summary.create_file_writer(str(path / "tensorboard")).as_default(step=0):
            tf.summary.text("gradient", "\n\n".join((table, *lines)))
            if self.graph is not None:
                tf.summary.graph(self.graph)
        return path
