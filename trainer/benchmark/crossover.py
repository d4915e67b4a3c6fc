"""From which size on one device is faster than another, and how sure that is."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from trainer.benchmark.timing import Timing

_UNSURE = "neither device is faster for sure: the timings overlap"
_RESAMPLES = 1000


@dataclass(frozen=True)
class Crossover:
    """Where the second device begins to win.

    Attributes:
        size: From which on its time is less, at every larger size too; None where there is none.
        interval: In which that lies with 95% confidence; None where resampling finds none.
        reason: Why there is none, in words; "" where there is one.
    """

    size: float | None
    interval: tuple[float, float] | None
    reason: str

    def told(self, size: str) -> str:
        """Returns it in words; `size` names what grows."""
        if self.size is None:
            return self.reason
        if self.interval is None:
            return "neither is faster for sure"
        low, high = self.interval
        return f"faster from {size} {self.size:.3g} on (95% interval: {low:.3g} to {high:.3g})"

    def draw(self, axes: Axes, device: str) -> None:
        """Marks where `device` begins to win, and the interval; nothing where that is not sure."""
        if self.size is None or self.interval is None:
            return
        axes.axvline(self.size, color="grey", linestyle=":")
        text = f" {device} wins from {self.size:.3g} on"
        axes.text(self.size, axes.get_ylim()[0], text, rotation=90, va="bottom")
        axes.axvspan(*self.interval, color="grey", alpha=0.15, linewidth=0)


def find_crossover(
    sizes: list[int], first: list[Timing], second: list[Timing], *, seed: int
) -> Crossover:
    """Finds the size from which on the second device is faster.

    Between two sizes the logarithm of the ratio of times is taken to be a straight line of the
    logarithm of the size. The interval comes from a bootstrap: the blocks of every timing are drawn
    again, with replacement, 1000 times (Efron and Tibshirani, An Introduction to the Bootstrap,
    chapter 13).

    Args:
        sizes: Ascending.
        first: Of the first device, one for each size.
        second: Likewise.
        seed: Of the resampling.
    """
    found = _crossing(sizes, _ratios(first, second))
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(_RESAMPLES):
        resampled = [_redrawn(timings, generator) for timings in (first, second)]
        crossing = _crossing(sizes, [math.log(b / a) for a, b in zip(*resampled, strict=True)])
        drawn.append(math.inf if crossing is None else crossing)
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    if found is None:
        sure = low == math.inf
        told = "the second device is not faster at the largest size"
        return Crossover(None, None, told if sure else _UNSURE)
    if found == sizes[0]:
        sure = high == sizes[0]
        return Crossover(
            None, None, "the second device is faster at every size" if sure else _UNSURE
        )
    interval = (float(low), float(high)) if math.isfinite(high) else None
    return Crossover(found, interval, "")


def _ratios(first: list[Timing], second: list[Timing]) -> list[float]:
    return [math.log(b.median / a.median) for a, b in zip(first, second, strict=True)]


def _redrawn(timings: list[Timing], generator: np.random.Generator) -> list[float]:
    drawn = (generator.choice(t.block_seconds, len(t.block_seconds)) for t in timings)
    return [float(np.median(blocks)) for blocks in drawn]


def _crossing(sizes: list[int], log_ratios: list[float]) -> float | None:
    """Returns where the ratio turns negative for good; None where it ends positive."""
    last = next((i for i in reversed(range(len(sizes))) if log_ratios[i] >= 0), None)
    if last is None:
        return float(sizes[0])
    if last == len(sizes) - 1:
        return None
    (x, y), (u, v) = ((math.log(sizes[i]), log_ratios[i]) for i in (last, last + 1))
    return math.exp(x + (u - x) * y / (y - v))
