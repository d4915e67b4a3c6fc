"""Times a call in blocks after a warm-up, and waits for the device at both ends of each block.

This module does not import TensorFlow: a process that times another runtime must not load it.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_logger = logging.getLogger(__name__)

_AGREEMENT = 0.05  # the warm-up ends when two blocks in a row differ by at most this fraction
_WIDE_IQR = 0.1  # a timing is unstable if its interquartile range is a larger part of the median
_CLOCK_READINGS = 1000  # a block takes at least as long as reading the clock so many times


@dataclass(frozen=True)
class Budget:
    """How much is measured."""

    blocks: int = 9  # timed blocks of each measurement
    block_seconds: float = 0.02  # minimum duration of a block
    warmup_seconds: float = 2.0  # the warm-up ends after this time even if no two blocks agreed
    square_sizes: tuple[int, ...] = ()  # n of [n, n] x [n, n]
    dot_sizes: tuple[int, ...] = ()  # n of [1, n] x [n, 1]


@dataclass
class Timing:
    """Duration of one call."""

    block_seconds: list[float]  # mean duration of a call, for each block
    first_seconds: float = 0.0  # the first call: tracing, compiling, allocating memory
    calls_per_block: int = 1
    warmup_blocks: int = 0
    settled: bool = True  # whether two blocks in a row agreed at the end of the warm-up

    def percentile(self, percent: float) -> float:
        """Returns a percentile of the blocks, in seconds."""
        return float(np.percentile(self.block_seconds, percent))

    @property
    def median(self) -> float:
        """Median of the blocks, in seconds."""
        return self.percentile(50)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the blocks, in seconds."""
        return self.percentile(25), self.percentile(75)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the median, by order statistics.

        Distribution-free: Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2.
        """
        ordered, n = sorted(self.block_seconds), len(self.block_seconds)
        reach = 1.96 * math.sqrt(n) / 2
        low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
        return ordered[max(low, 0)], ordered[min(high, n - 1)]

    @property
    def stable(self) -> bool:
        """Whether the warm-up settled and the interquartile range is small."""
        low, high = self.quartiles
        return self.settled and high - low <= _WIDE_IQR * self.median

    def relative_to(self, other: "Timing") -> "Timing":
        """Returns ratios of interleaved blocks; a slow phase of the machine cancels out."""
        pairs = zip(self.block_seconds, other.block_seconds, strict=True)
        return Timing([a / b for a, b in pairs])

    def to_json(self) -> dict[str, Any]:
        """Returns the statistics as plain values."""
        return {
            "median_seconds": self.median,
            "quartiles_seconds": list(self.quartiles),
            "interval_seconds": list(self.interval),
            "first_seconds": self.first_seconds,
            "blocks": len(self.block_seconds),
            "calls_per_block": self.calls_per_block,
            "warmup_blocks": self.warmup_blocks,
            "stable": self.stable,
        }


class Measurement(Timing):
    """A call that is being timed. The blocks of several measurements can be interleaved."""

    def __init__(
        self,
        call: Callable[[], Any],
        wait: Callable[[], Any] = lambda: None,
        budget: Budget | None = None,
        row: dict[str, Any] | None = None,
        *,
        parts: int = 1,
    ) -> None:
        """Makes the first call, finds the number of calls in a block, and warms up.

        Args:
            call: The call to time. Its inputs are created before, not in the call.
            wait: Returns when the device has finished all its work.
            budget: Durations of blocks and warm-up.
            row: The row of the result: key, device, the work in flops and bytes, and so on.
            parts: Blocks are timings of one of so many equal parts of a call.
        """
        self._call, self._wait, self._parts, self.row = call, wait, parts, row or {}
        self.calls_per_block = 1
        self.call_seconds = first = self._time_block()  # of one call, in the last block
        budget = budget or Budget()
        least = max(budget.block_seconds, clock_seconds(_CLOCK_READINGS))
        self._grow(least)
        warmup_blocks, settled = self._warm_up(budget.warmup_seconds)
        self._grow(least)  # calls are faster after the warm-up
        super().__init__([], first, self.calls_per_block, warmup_blocks, settled)

    def run_block(self) -> None:
        """Times one block and counts it."""
        self.block_seconds.append(self._time_block() / self._parts)

    def complete_row(self) -> dict[str, Any]:
        """Adds timing and rates to the row, and returns it."""
        self.row["seconds"] = self.median
        self.row["gflop_per_s"] = self.row["flops"] / self.median / 1e9
        self.row["gbyte_per_s"] = self.row["bytes"] / self.median / 1e9
        self.row["timing"] = self.to_json()
        return self.row

    def _time_block(self) -> float:
        """Returns the mean seconds of the calls of one block."""
        call, calls = self._call, range(self.calls_per_block)
        self._wait()
        start = time.perf_counter()
        for _ in calls:
            call()
        self._wait()
        self.call_seconds = (time.perf_counter() - start) / self.calls_per_block
        return self.call_seconds

    def _grow(self, least_seconds: float) -> None:
        while (seconds := self._time_block() * self.calls_per_block) < least_seconds:
            more = math.ceil(self.calls_per_block * least_seconds / max(seconds, 1e-9))
            self.calls_per_block = max(2 * self.calls_per_block, more)

    def _warm_up(self, max_seconds: float) -> tuple[int, bool]:
        end = time.perf_counter() + max_seconds
        last, blocks = self._time_block(), 1
        while blocks < 2 or time.perf_counter() < end:
            this, blocks = self._time_block(), blocks + 1
            if abs(this - last) <= _AGREEMENT * max(this, last):
                return blocks, True
            last = this
        return blocks, False


def run_interleaved(measurements: Sequence[Measurement], *, blocks: int, seed: int) -> None:
    """Runs blocks of all measurements in turns, in a new random order for each round.

    A slow phase of the machine then affects all measurements alike.
    """
    _logger.info("measuring %d blocks of each call, in turns", blocks)
    order, generator = list(measurements), random.Random(seed)
    for _ in range(blocks):
        generator.shuffle(order)
        for measurement in order:
            measurement.run_block()


def clock_seconds(readings: int) -> float:
    """Returns the duration of so many readings of the clock."""
    start = time.perf_counter()
    for _ in range(readings):
        time.perf_counter()
    return time.perf_counter() - start
