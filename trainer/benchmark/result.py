"""The result of a benchmark, and its directory.

runs/<UTC time>-benchmark-<name>/
    <name>.json      all measurements and their conditions
    <name>.png       the figure
    events.out.*     table and figure for TensorBoard
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainer.environment import describe_environment
from trainer.errors import InputError
from trainer.files import write_text
from trainer.report import markdown_table
from trainer.run import make_directory

RATES = ("seconds", "timing", "gflop_per_s", "gbyte_per_s", "share")  # columns
# The titles of columns. The others are the keys of a row.
_TITLES = {"timing": "IQR", "batches": "IQR", "gflop_per_s": "GFLOP/s", "gbyte_per_s": "GB/s"}
_STYLES = (".-", "x--", "+-.", "1:")  # marker and line of each label in the figure


@dataclass
class BenchmarkResult:
    """The result of a benchmark."""

    name: str
    subject: str  # title of the table
    rows: list[dict[str, Any]]  # plain values, one dictionary for each measured thing
    columns: tuple[str, ...]  # of the printed table: keys of a row
    settings: dict[str, Any]
    devices: list[str]
    x: str  # the column that the figure draws the times against: a size or a name
    panel: str = ""  # the figure has one panel for each value of this column; "": only one panel
    fingerprint: str = ""  # of the data
    skipped: dict[str, str] = field(default_factory=dict)  # the reason for each skipped thing

    def __post_init__(self) -> None:
        """Adds the conditions, the reason if no GPU is measured, and how devices compare.

        Raises:
            InputError: There are no rows.
        """
        if not self.rows:
            reasons = "; ".join(map(": ".join, self.skipped.items()))
            raise InputError(f"nothing was measured: {reasons}")
        if len(self.devices) > 1:  # how many times as fast as the first device
            self.columns += ("speedup",)
            seconds = {row["key"]: row["seconds"] for row in self.rows}
            for row in self.rows:
                key = row["key"].replace(row["device"], self.devices[0])
                # Only GPUs have TF32. It is compared with the CPU's float32.
                first = seconds.get(key.replace("tf32", "float32"))
                row["speedup"] = first / row["seconds"] if first else None
        self.environment = describe_environment(tuple(self.devices), self.fingerprint)
        self.settings["devices"] = self.devices
        if self.name != "formats" and not any(name.startswith("GPU") for name in self.devices):
            self.skipped["GPU"] = "--device names none, or `trainer doctor` states the reason"

    def document(self) -> dict[str, Any]:
        """Returns everything except the figure as plain values."""
        names = ("subject", "settings", "rows", "skipped", "environment")
        return {"benchmark": self.name, **{name: getattr(self, name) for name in names}}

    def json(self) -> str:
        """Returns the document as JSON."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False, allow_nan=False)
        return text + "\n"

    def table(self) -> list[list[str]]:
        """Returns the printed table; the first line has the titles."""
        lines = [[_TITLES.get(key, key.replace("_", " ")) for key in self.columns]]
        lines += [[_text(key, row[key]) for key in self.columns] for row in self.rows]
        # The formats are few and have many columns: each is a column.
        return [*map(list, zip(*lines, strict=True))] if self.name == "formats" else lines

    def lines(self) -> list[str]:
        """Returns the lines below the table."""
        skipped = [f"skipped: {key}: {reason}" for key, reason in self.skipped.items()]
        return [*skipped, "docs/benchmark.md explains the columns"]

    def write(self, runs: str) -> Path:
        """Writes a new directory for the result into the folder `runs`, and returns its path."""
        path = make_directory(runs, f"benchmark-{self.name}")
        write_text(path / f"{self.name}.json", self.json())
        with tf.summary.create_file_writer(str(path)).as_default(step=0):
            text = "\n\n".join([markdown_table(self.table()), *self.lines()])
            tf.summary.text(f"benchmark/{self.name}_table", text)
            # Not scalars: TensorBoard would smooth over sizes and draw them on a linear axis.
            picture = path / f"{self.name}.png"
            draw_times(self.rows, self.x, self.panel).savefig(picture, dpi=150)
            pixels = tf.io.decode_png(picture.read_bytes(), channels=3)
            tf.summary.image(f"benchmark/{self.name}", pixels[tf.newaxis])
        return path


def _text(key: str, value: Any) -> str:
    """Returns a cell of the printed table."""
    if value is None:
        return ""
    if isinstance(value, dict):  # the interquartile range of a timing, relative to its median
        low, high = value["quartiles_seconds"]
        return f"{(high - low) / value['median_seconds']:.0%}"
    if key.endswith("seconds"):
        return time_text(value)
    if key.endswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def time_text(seconds: float) -> str:
    """Returns a duration with a suitable unit: 0.00123 is "1.23 ms"."""
    return str(EngFormatter("s")(float(f"{seconds:.3g}"))).replace("\N{MICRO SIGN}", "u")


def draw_times(rows: list[dict[str, Any]], x: str, panel: str) -> Figure:
    """Draws medians and quartiles, one color for each device, one style for each "label"."""
    panels, devices, labels = (
        list(dict.fromkeys(row.get(key, "") for row in rows)) for key in (panel, "device", "label")
    )
    figure = Figure(figsize=(8 * len(panels), 6), layout="constrained")
    is_size = isinstance(rows[0][x], int)
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for device, label in itertools.product(devices, labels):
            wanted = (title, device, label)
            curve = [r for r in rows if (r.get(panel, ""), r["device"], r["label"]) == wanted]
            if not curve:
                continue
            timings = [row["timing"] for row in curve]
            median = np.array([each["median_seconds"] for each in timings])
            low, high = np.transpose([each["quartiles_seconds"] for each in timings])
            style = _STYLES[labels.index(label) % len(_STYLES)]
            axes.errorbar(
                [row[x] for row in curve],
                median,
                [median - low, high - median],
                fmt=style if is_size else style[0],
                color=f"C{devices.index(device)}",
                label=f"{device} {label}",
            )
        axes.set(title=title, xlabel=x.replace("_", " "), xscale="log" if is_size else "linear")
        axes.set(ylabel="seconds: median and quartiles", yscale="log")
        axes.tick_params("x", rotation=0 if is_size else 90)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=9)
    return figure
