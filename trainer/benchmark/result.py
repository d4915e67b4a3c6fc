"""The result of a benchmark, and its directory.

runs/<UTC time>-benchmark-<name>/
    <name>.json      all measurements and their conditions
    <name>.png       the figure
    tensorboard/     table, figure and scalars
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainer.benchmark.devices import select_each
from trainer.benchmark.timing import Measurement
from trainer.errors import InputError
from trainer.files import write_text
from trainer.run import make_directory


@dataclass
class BenchmarkResult:
    """The result of a benchmark."""

    name: str
    subject: str  # title of the table
    rows: list[dict[str, Any]]  # plain values, one dictionary for each measured thing
    columns: dict[str, Callable[[dict[str, Any]], str]]  # titles and texts of the printed table
    settings: dict[str, Any]
    environment: dict[str, Any]  # versions, processors and other conditions
    skipped: dict[str, str] = field(default_factory=dict)  # the reason for each skipped thing
    notes: list[str] = field(default_factory=list)  # results that are sentences
    facts: dict[str, Any] = field(default_factory=dict)  # further results
    baselines: list[Measurement] = field(default_factory=list)  # they make two results comparable
    figure: Figure | None = None
    size: str = ""  # the column that TensorBoard draws the scalars against
    scalars: Callable[[dict[str, Any]], dict[str, float]] = lambda _: {}  # by tag, of a row
    transposed: bool = False  # whether the printed table has a column for each row

    def document(self) -> dict[str, Any]:
        """Returns everything except the figure as plain values."""
        names = ("subject", "settings", "rows", "facts", "skipped", "environment")
        baselines = {entry.row["key"]: entry.to_json() for entry in self.baselines}
        plain = {name: getattr(self, name) for name in names}
        return {"benchmark": self.name, **plain, "baselines": baselines}

    def json(self) -> str:
        """Returns the document as JSON."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        return text + "\n"

    def table(self) -> list[list[str]]:
        """Returns the printed table; the first line has the titles."""
        lines = [list(self.columns)]
        lines += [[show(row) for show in self.columns.values()] for row in self.rows]
        return [list(line) for line in zip(*lines, strict=True)] if self.transposed else lines

    def lines(self) -> list[str]:
        """Returns the lines below the table."""
        skipped = [f"skipped: {key}: {reason}" for key, reason in self.skipped.items()]
        return [*self.notes, *skipped, "docs/benchmark.md explains the columns"]

    def write(self, runs: str) -> Path:
        """Writes a new directory for the result into the folder `runs`, and returns its path.

        Raises:
            InputError: It cannot be written.
        """
        path = make_directory(runs, f"benchmark-{self.name}")
        try:
            write_text(path / f"{self.name}.json", self.json())
            if self.figure is not None:
                self.figure.savefig(path / f"{self.name}.png", dpi=150)
            self._write_tensorboard(path / "tensorboard")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from None
        return path

    def _write_tensorboard(self, path: Path) -> None:
        import tensorflow as tf

        from trainer.report import write_figure

        titles, *rows = self.table()
        lines = [titles, ["---"] * len(titles), *rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        with tf.summary.create_file_writer(str(path)).as_default(step=0):
            text = "\n\n".join([table, *self.lines()])
            tf.summary.text(f"benchmark/{self.name}_table", text)
            if self.figure is not None:
                write_figure(f"benchmark/{self.name}", self.figure)
        # One TensorBoard run for each device: devices are drawn in the same charts.
        scalars = [(row, self.scalars(row)) for row in self.rows]
        for device in dict.fromkeys(row["device"] for row, found in scalars if found):
            with tf.summary.create_file_writer(str(path / device.replace(":", ""))).as_default():
                for row, found in scalars:
                    for tag, value in found.items() if row["device"] == device else ():
                        tf.summary.scalar(tag, value, step=row[self.size])


def skipped_gpus(devices: list[str]) -> dict[str, str]:
    """Returns the reason if none of the devices is a GPU."""
    if any(name.startswith("GPU") for name in devices):
        return {}
    if select_each([]) == ["CPU:0"]:
        return {"GPU": "TensorFlow finds none on this machine; `trainer doctor` explains why"}
    return {"GPU": "--device does not name it"}


def with_unit(value: float, unit: str) -> str:
    """Returns a number with a metric prefix: 0.00123, "s" is "1.23 ms"."""
    rounded = float(f"{value:.3g}")
    return str(EngFormatter(unit)(rounded)).replace("\N{MICRO SIGN}", "u")


def time_text(seconds: float) -> str:
    """Returns a duration with a suitable unit: "1.23 ms"."""
    return with_unit(seconds, "s")
