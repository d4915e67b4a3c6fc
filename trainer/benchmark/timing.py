"""Times a call: in blocks, after it has become steady, with the device waited for at both ends.

Nothing here needs TensorFlow, so that a process that measures another runtime does not load it.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Two blocks in a row agree when they differ by no more than this share.
_AGREEMENT = 0.05
# A measurement is called unstable when its quartiles lie further apart than this share of it.
_WIDE = 0.1
# How far above the cost of reading the clock a block has to be.
_CLOCKS_A_BLOCK = 1000


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        first_seconds: The first call: tracing, compiling, allocating.
        block_seconds: Seconds of one call, as the mean of each block.
        calls_a_block: How many calls a block has.
        warm_up_blocks: Blocks that were run before and are not counted.
        settled: Whether two blocks in a row agreed before counting began.
    """

    first_seconds: float
    block_seconds: tuple[float, ...]
    calls_a_block: int
    warm_up_blocks: int
    settled: bool

    def percentile(self, share: float) -> float:
        """Returns the seconds that `share` percent of the blocks stayed below."""
        return float(np.percentile(self.block_seconds, share))

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return self.percentile(50)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds that a quarter and three quarters of the blocks stayed below."""
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
        """Whether it settled, and the quartiles lie close to the median."""
        low, high = self.quartiles
        return self.settled and high - low <= _WIDE * self.median

    def of_each(self, parts: int) -> "Timing":
        """Returns what one of so many equal parts of a call takes; the first call stays whole."""
        return replace(self, block_seconds=tuple(s / parts for s in self.block_seconds))

    def relative_to(self, other: "Timing") -> "Timing":
        """Returns the ratios of blocks that took turns: what slows both down cancels out."""
        pairs = zip(self.block_seconds, other.block_seconds, strict=True)
        return replace(self, block_seconds=tuple(own / its for own, its in pairs))

    def facts(self) -> dict[str, Any]:
        """Returns everything above in plain values."""
        return {
            "median_seconds": self.median,
            "quartiles_seconds": list(self.quartiles),
            "interval_seconds": list(self.interval),
            "first_seconds": self.first_seconds,
            "blocks": len(self.block_seconds),
            "calls_a_block": self.calls_a_block,
            "warm_up_blocks": self.warm_up_blocks,
            "stable": self.stable,
        }


class Measurement:
    """One call being measured; blocks of several measurements can take turns."""

    def __init__(
        self,
        call: Callable[[], Any],
        wait: Callable[[], Any] = lambda: None,
        *,
        block_seconds: float = 0.02,
        most_warm_up_seconds: float = 2.0,
    ) -> None:
        """Makes the first call, finds out how many calls make a block, and warms up.

        Args:
            call: What to time. Its inputs should be arguments bound before, not made in it.
            wait: Returns when the device has done all that was asked of it.
            block_seconds: A block takes at least so long, and never less than 1000 times what
                reading the clock costs.
            most_warm_up_seconds: After which counting begins even if no two blocks agreed.
        """
        self._call, self._wait = call, wait
        self._calls = 1
        self._blocks: list[float] = []
        self._last = 0.0
        self._first = self._time_block()
        least = max(block_seconds, _CLOCKS_A_BLOCK * clock_seconds())
        self._grow(least)
        self._warm_up_blocks, self._settled = self._warm_up(most_warm_up_seconds)
        self._grow(least)  # what has become steady is faster than it was

    @property
    def call_seconds(self) -> float:
        """Seconds of one call, as last seen."""
        return self._last

    def run_block(self) -> None:
        """Times one block and counts it."""
        self._blocks.append(self._time_block())

    def timing(self) -> Timing:
        """Returns what the blocks so far say; there must be one at least."""
        return Timing(
            self._first, tuple(self._blocks), self._calls, self._warm_up_blocks, self._settled
        )

    def _time_block(self) -> float:
        """Returns the mean seconds of the calls of a block."""
        call, calls = self._call, range(self._calls)
        self._wait()
        start = time.perf_counter()
        for _ in calls:
            call()
        self._wait()
        self._last = (time.perf_counter() - start) / self._calls
        return self._last

    def _grow(self, least_seconds: float) -> None:
        while (seconds := self._time_block() * self._calls) < least_seconds:
            more = math.ceil(self._calls * least_seconds / max(seconds, 1e-9))
            self._calls = max(2 * self._calls, more)

    def _warm_up(self, most_seconds: float) -> tuple[int, bool]:
        end = time.perf_counter() + most_seconds
        last, blocks = self._time_block(), 1
        while blocks < 2 or time.perf_counter() < end:
            this, blocks = self._time_block(), blocks + 1
            if abs(this - last) <= _AGREEMENT * max(this, last):
                return blocks, True
            last = this
        return blocks, False


def take_turns(measurements: Iterable[Measurement], *, blocks: int, seed: int) -> None:
    """Runs blocks of all measurements, each round in another order, so that drift hits all alike.

    Args:
        measurements: Of what is to be compared.
        blocks: How many of each.
        seed: Of the orders.
    """
    order, generator = list(measurements), random.Random(seed)
    for _ in range(blocks):
        generator.shuffle(order)
        for measurement in order:
            measurement.run_block()


def clock_seconds(readings: int = 1000) -> float:
    """Returns what reading the clock costs, in seconds."""
    start = time.perf_counter()
    for _ in range(readings):
        time.perf_counter()
    return (time.perf_counter() - start) / readings


def joined(timings: Sequence[Timing]) -> Timing:
    """Returns several timings of the same call, from several processes, as one.

    The first call's seconds are their median; it settled if each did.
    """
    return Timing(
        float(np.median([t.first_seconds for t in timings])),
        tuple(seconds for t in timings for seconds in t.block_seconds),
        max(t.calls_a_block for t in timings),
        sum(t.warm_up_blocks for t in timings),
        all(t.settled for t in timings),
    )
