"""Curves of time against size, and the size from which another device is faster."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from trainer.benchmark.timing import Measurement, Timing

_RESAMPLES = 1000
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Crossover:
    """The size from which a second device is faster, at every larger size too."""

    size: float | None  # None if there is no such size, or if it is not certain
    interval: tuple[float, float] | None  # its 95% confidence interval
    reason: str  # the reason if there is none

    def describe(self, size: str) -> str:
        """Returns a sentence; `size` is the name of the size."""
        if self.size is None or self.interval is None:
            return self.reason
        low, high = self.interval
        return f"faster from {size} {self.size:.3g} (95% interval: {low:.3g} to {high:.3g})"


class Curves:
    """Curves of time against size, one for each device and label."""

    def __init__(
        self,
        entries: list[Measurement],
        size: str,
        label: Callable[[dict[str, Any]], str],
        *,
        first: str,
        seed: int,
    ) -> None:
        """Groups entries into curves, and compares the first device with each other device.

        Args:
            entries: Rows with their timings, in ascending size.
            size: The column of the size.
            label: Everything else that the rows of a curve share, for example "dot/float32".
            first: The first device.
            seed: Random seed for the resampling.
        """
        self._size = size.replace("_", " ")
        self.timings: dict[tuple[str, str], dict[int, Timing]] = {}
        for entry in entries:
            key = entry.row["device"], label(entry.row)
            self.timings.setdefault(key, {})[entry.row[size]] = entry
        self.crossovers: dict[str, Crossover] = {}  # by label, first and other device
        for (device, name), other in self.timings.items():
            # Only GPUs have TF32. It is compared with the CPU's float32.
            baseline = self.timings.get((first, name.replace("tf32", "float32")), {})
            sizes = [n for n in baseline if n in other]
            if sizes and device != first:
                both = [baseline[n] for n in sizes], [other[n] for n in sizes]
                crossover = find_crossover(sizes, *both, seed=seed)
                self.crossovers[f"{name}/{first}/{device}"] = crossover

    def facts(self) -> dict[str, Any]:
        """Returns the crossovers as plain values."""
        return {"crossovers": {key: asdict(each) for key, each in self.crossovers.items()}}

    def notes(self) -> list[str]:
        """Returns a line for each crossover."""
        lines = []
        for key, crossover in self.crossovers.items():
            *label, first, device = key.split("/")
            text = crossover.describe(self._size)
            lines.append(f"{', '.join(label)}: {device} compared with {first}: {text}")
        return lines

    def draw(self, axes: Axes, prefix: str = "", *, mark: str = "") -> None:
        """Draws medians with a band between the quartiles, and a line for each crossover.

        Args:
            axes: An empty panel.
            prefix: Only curves whose label starts with this are drawn.
            mark: Only crossovers whose label starts with this are drawn.
        """
        shown = {key: curve for key, curve in self.timings.items() if key[1].startswith(prefix)}
        devices = list(dict.fromkeys(device for device, _ in shown))
        labels = list(dict.fromkeys(label for _, label in shown))
        for (device, label), timings in shown.items():
            low, high = zip(*(timing.quartiles for timing in timings.values()), strict=True)
            colour = f"C{devices.index(device)}"
            look = {"color": colour, "linestyle": _STYLES[labels.index(label) % len(_STYLES)]}
            medians = [timing.median for timing in timings.values()]
            axes.loglog([*timings], medians, marker=".", label=f"{device} {label}", **look)
            axes.fill_between([*timings], low, high, color=colour, alpha=0.2, linewidth=0)
        for key, crossover in self.crossovers.items():
            if crossover.size and crossover.interval and key.startswith(mark):
                axes.axvline(crossover.size, color="grey", linestyle=":")
                axes.axvspan(*crossover.interval, color="grey", alpha=0.15, linewidth=0)
                text = f" {key.rpartition('/')[2]} is faster from {crossover.size:.3g}"
                axes.text(crossover.size, axes.get_ylim()[0], text, rotation=90, va="bottom")
        axes.set(xlabel=self._size, ylabel="seconds: median and quartiles")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize=9)


def find_crossover(
    sizes: list[int], first: list[Timing], second: list[Timing], *, seed: int
) -> Crossover:
    """Finds the size from which the second device is faster.

    Between two sizes, the logarithm of the ratio is interpolated linearly in the logarithm of the
    size. The interval is a bootstrap: the blocks of each timing are drawn again, with replacement,
    1000 times (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).

    Args:
        sizes: In ascending order.
        first: Timings of the first device, one for each size.
        second: Timings of the second device.
        seed: Random seed for the resampling.
    """
    generator = np.random.default_rng(seed)

    def log_medians(timings: list[Timing]) -> Any:  # float64 [sizes, resamples]
        shapes = [(_RESAMPLES, len(timing.block_seconds)) for timing in timings]
        draws = [
            generator.choice(timing.block_seconds, shape)
            for timing, shape in zip(timings, shapes, strict=True)
        ]
        return np.log([np.median(draw, axis=1) for draw in draws])

    ratios = [math.log(b.median / a.median) for a, b in zip(first, second, strict=True)]
    size = _crossing(sizes, ratios)
    drawn = [_crossing(sizes, r) for r in (log_medians(second) - log_medians(first)).T]
    low, high = (float(size) for size in np.percentile(drawn, [2.5, 97.5], method="nearest"))
    if low == math.inf:
        return Crossover(None, None, "not faster at the largest size")
    if high == sizes[0]:
        return Crossover(None, None, "faster at every size")
    if high == math.inf or size in (sizes[0], math.inf):
        return Crossover(None, None, "neither is reliably faster: the timings overlap")
    return Crossover(size, (low, high), "")


def _crossing(sizes: list[int], log_ratios: list[float]) -> float:
    """Returns the size from which the ratio stays negative; infinity if it ends positive."""
    last = next((i for i in reversed(range(len(sizes))) if log_ratios[i] >= 0), None)
    if last is None:
        return float(sizes[0])
    if last == len(sizes) - 1:
        return math.inf
    (x, y), (u, v) = ((math.log(sizes[i]), log_ratios[i]) for i in (last, last + 1))
    return math.exp(x + (u - x) * y / (y - v))
