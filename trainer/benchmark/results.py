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
import math
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer import devices as places
from trainer.errors import InputError
from trainer.files import write_text
from trainer.run import make_directory

_PLOT_WIDTH = 64


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
        notes: What people should read besides, a line each.
        facts: More of what was found, in plain values.
        references: Timings of what the machine can do, by name: by them two results are made
            comparable.
        figures: By file name.
        curves: For TensorBoard: by run and tag, values by step.
        plots: For the terminal.
    """

    name: str
    subject: str
    rows: list[dict[str, Any]]
    table: list[dict[str, str]]
    skipped: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    references: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict, repr=False)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict, repr=False)
    plots: list[str] = field(default_factory=list, repr=False)

    def document(self) -> dict[str, Any]:
        """Returns everything but the pictures, in plain values."""
        return {
            "benchmark": self.name,
            "subject": self.subject,
            "settings": self.settings,
            "rows": self.rows,
            "facts": self.facts,
            "references": self.references,
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
        path = make_directory(runs, f"benchmark-{self.name}")
        try:
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

        from trainer.figures import as_png
        from trainer.report import write_image

        smoothing = ["Set the page's smoothing to 0: it averages neighbouring sizes."]
        lines = [
            *self.notes,
            *(smoothing if self.curves else []),
            *(f"{name}: {reason}" for name, reason in self.skipped.items()),
        ]
        with tf.summary.create_file_writer(str(path)).as_default(step=0):
            if self.curves:
                tf.summary.experimental.write_raw_pb(_layout(self.name, self.curves))
            tf.summary.text(f"benchmark/{self.name}_table", "\n\n".join([self._markdown(), *lines]))
            for name, figure in self.figures.items():
                write_image(f"benchmark/{self.name}_{name}", as_png(figure))
        for run, tags in self.curves.items():
            with tf.summary.create_file_writer(str(path / run)).as_default():
                for tag, points in tags.items():
                    for step, value in points:
                        tf.summary.scalar(tag, value, step=step)


def _layout(name: str, curves: dict[str, dict[str, list[tuple[int, float]]]]) -> bytes:
    """Returns the layout of TensorBoard's page of custom scalars: a chart for each tag."""
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar import summary as layout_summary

    tags = dict.fromkeys(tag for run in curves.values() for tag in run)
    charts = [
        layout_pb2.Chart(title=tag, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$"]))
        for tag in tags
    ]
    title = f"{name}: {' against '.join(curves)}"
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title=title, chart=charts)])
    packed: bytes = layout_summary.pb(layout).SerializeToString()
    return packed


def skipped_gpus(names: list[str]) -> dict[str, str]:
    """Returns why there are no figures of a GPU, where none of the devices is one."""
    if any(name.startswith("GPU") for name in names):
        return {}
    if places.select_each([]) == ["CPU:0"]:
        return {"GPU": "TensorFlow finds none on this machine; `trainer doctor` says more"}
    return {"GPU": "there is one, but it was not asked for"}


def rate_text(rate: float, unit: str) -> str:
    """Returns a rate with the prefix that suits it: 3e9 "FLOP/s" is "3 GFLOP/s"."""
    for prefix, factor in (("G", 1e9), ("M", 1e6)):
        if rate >= factor:
            return f"{rate / factor:.3g} {prefix}{unit}"
    return f"{rate / 1e3:.3g} k{unit}"


def time_text(seconds: float) -> str:
    """Returns a time with the unit that suits it: "1.23 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def terminal_plot(
    series: dict[str, dict[int, float]], *, title: str, show: Callable[[float], str]
) -> str:
    """Draws curves in characters: a line for each size, and along it a logarithmic scale.

    Args:
        series: By name, positive values by size.
        title: Above the drawing.
        show: Writes a value, for the ends of the scale.

    Returns:
        Lines of at most 80 characters; each curve is drawn by a letter.
    """
    values = [value for curve in series.values() for value in curve.values()]
    low, high = math.log(min(values)), math.log(max(values))
    sizes = sorted({size for curve in series.values() for size in curve})
    margin = max(len(f"{size:,}") for size in sizes)
    letters = dict(zip(series, string.ascii_letters, strict=False))
    lines = [title, *(f"{letter} {name}" for name, letter in letters.items())]
    for size in sizes:
        line = [" "] * _PLOT_WIDTH
        for name, letter in letters.items():
            if size in series[name]:
                place = (math.log(series[name][size]) - low) / ((high - low) or 1)
                line[round(place * (_PLOT_WIDTH - 1))] = letter
        lines.append(f"{size:>{margin},} |{''.join(line).rstrip()}")
    ends = show(math.exp(low)), show(math.exp(high))
    lines.append(f"{'':>{margin}} +{'-' * _PLOT_WIDTH}")
    lines.append(f"{'':>{margin}}  {ends[0]}{ends[1]:>{_PLOT_WIDTH - len(ends[0])}}")
    return "\n".join(lines)
