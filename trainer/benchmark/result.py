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
from trainer.environment import describe_environment
from trainer.errors import InputError
from trainer.files import write_text
from trainer.run import make_directory

# The key of a row, and the format of its value: for `format`, or a function that returns the text.
Columns = dict[str, tuple[str, str | Callable[[Any], str]]]


@dataclass
class BenchmarkResult:
    """The result of a benchmark."""

    name: str
    subject: str  # title of the table
    rows: list[dict[str, Any]]  # plain values, one dictionary for each measured thing
    columns: Columns  # of the printed table, by title
    settings: dict[str, Any]
    devices: list[str]
    fingerprint: str = ""  # of the data
    skipped: dict[str, str] = field(default_factory=dict)  # the reason for each skipped thing
    notes: list[str] = field(default_factory=list)  # results that are sentences
    facts: dict[str, Any] = field(default_factory=dict)  # further results
    baselines: list[Measurement] = field(default_factory=list)  # they make two results comparable
    figure: Figure | None = None
    size: str = ""  # the column that TensorBoard draws the scalars against
    scalars: Callable[[dict[str, Any]], dict[str, float]] = lambda _: {}  # by tag, of a row
    transposed: bool = False  # whether the printed table has a column for each row

    def __post_init__(self) -> None:
        """Adds the conditions of the measurement, and the reason if no GPU is measured."""
        self.environment = describe_environment(tuple(self.devices), self.fingerprint)
        self.settings["devices"] = self.devices
        if not any(name.startswith("GPU") for name in self.devices) and self.name != "formats":
            reason = "TensorFlow finds none on this machine; `trainer doctor` explains why"
            found = any(name.startswith("GPU") for name in select_each([]))
            self.skipped["GPU"] = "--device does not name it" if found else reason

    def document(self) -> dict[str, Any]:
        """Returns everything except the figure as plain values."""
        names = ("subject", "settings", "rows", "facts", "skipped", "environment")
        baselines = {entry.row["key"]: entry.timing() for entry in self.baselines}
        plain = {name: getattr(self, name) for name in names}
        return {"benchmark": self.name, **plain, "baselines": baselines}

    def json(self) -> str:
        """Returns the document as JSON."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        return text + "\n"

    def table(self) -> list[list[str]]:
        """Returns the printed table; the first line has the titles."""
        lines = [list(self.columns)]
        for row in self.rows:
            cells = [(row[key], spec) for key, spec in self.columns.values()]
            lines.append([_text(value, spec) for value, spec in cells])
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
        for device in dict.fromkeys(row["device"] for row in self.rows if self.size):
            with tf.summary.create_file_writer(str(path / device.replace(":", ""))).as_default():
                for row in (row for row in self.rows if row["device"] == device):
                    for tag, value in self.scalars(row).items():
                        tf.summary.scalar(tag, value, step=row[self.size])


def _text(value: Any, spec: str | Callable[[Any], str]) -> str:
    if value is None:
        return ""
    return format(value, spec) if isinstance(spec, str) else spec(value)


def time_text(seconds: float) -> str:
    """Returns a duration with a suitable unit: 0.00123 is "1.23 ms"."""
    return str(EngFormatter("s")(float(f"{seconds:.3g}"))).replace("\N{MICRO SIGN}", "u")


def spread_text(timing: dict[str, Any]) -> str:
    """Returns the interquartile range of a timing, relative to its median."""
    low, high = timing["quartiles_seconds"]
    return f"{(high - low) / timing['median_seconds']:.0%}"
