"""What a benchmark found, and where it is kept: JSON, CSV, pictures and TensorBoard.

runs/<UTC time>-benchmark-<name>/
    <name>.json      everything that was measured, and under which conditions
    <name>.csv       the table
    *.png            the figures
    tensorboard/     both, for TensorBoard
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer.errors import InputError
from trainer.run import name_directory, write_text


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        name: Of the benchmark.
        subject: What was measured, in words.
        rows: A dictionary of plain values for each thing that was measured.
        table: The same for people: a dictionary of title and text for each row.
        skipped: What was not measured, and why.
        settings: How it was measured.
        environment: What the figures depend on besides.
        figures: By file name.
    """

    name: str
    subject: str
    rows: list[dict[str, Any]]
    table: list[dict[str, str]]
    skipped: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict, repr=False)

    def document(self) -> dict[str, Any]:
        """Returns everything but the pictures, in plain values."""
        return {
            "benchmark": self.name,
            "subject": self.subject,
            "settings": self.settings,
            "rows": self.rows,
            "skipped": self.skipped,
            "environment": self.environment,
        }

    def json(self) -> str:
        """Returns the document as JSON."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        return text + "\n"

    def write(self, runs: str) -> Path:
        """Keeps it in a new directory of its own.

        Args:
            runs: Folder that holds the run directories.

        Returns:
            The directory.

        Raises:
            InputError: It cannot be written.
        """
        path = name_directory(runs, f"benchmark-{self.name}")
        try:
            path.mkdir(parents=True)
            write_text(path / f"{self.name}.json", self.json())
            write_text(path / f"{self.name}.csv", self._csv())
            for name, figure in self.figures.items():
                figure.savefig(path / f"{name}.png", dpi=150)
            self._write_tensorboard(path / "tensorboard")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        return path

    def _csv(self) -> str:
        """Returns the rows, without what is nested in them."""
        flat = [
            {k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in self.rows
        ]
        text = io.StringIO()
        if flat:
            titles = list(dict.fromkeys(key for row in flat for key in row))
            writer = csv.DictWriter(text, titles, lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
        return text.getvalue()

    def _markdown(self) -> str:
        if not self.table:
            return "nothing was measured"
        titles = list(self.table[0])
        lines = [titles, ["---"] * len(titles), *([row[t] for t in titles] for row in self.table)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def _write_tensorboard(self, path: Path) -> None:
        import tensorflow as tf

        from trainer.report import as_image

        reasons = "".join(f"\n\n{name}: {reason}" for name, reason in self.skipped.items())
        with tf.summary.create_file_writer(str(path)).as_default(step=0):
            tf.summary.text(f"benchmark/{self.name}", self._markdown() + reasons)
            for name, figure in self.figures.items():
                tf.summary.image(f"benchmark/{name}", as_image(figure))
