"""Times a call in blocks after a warm-up, and waits for the device at both ends of each block.

This module does not import TensorFlow: a process that times another runtime must not load it.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_AGREEMENT = 0.05  # the warm-up ends when two blocks in a row differ by at most this fraction


@dataclass(frozen=True)
class Budget:
    """How much is measured."""

    blocks: int = 9  # timed blocks of each measurement
    block_seconds: float = 0.02  # minimum duration of a block; reading the clock takes about 1e-7
    warmup_seconds: float = 2.0  # the warm-up ends after this time even if no two blocks agreed
    square_sizes: tuple[int, ...] = ()  # n of [n, n] x [n, n]
    dot_sizes: tuple[int, ...] = ()  # n of [1, n] x [n, 1]


class Measurement:
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
        self.call, self._wait, self._parts, self.row = call, wait, parts, row or {}
        self.block_seconds: list[float] = []  # mean duration of a call or part, for each block
        self.calls_per_block = 1
        self.first_seconds = self._time_block()  # tracing, compiling, allocating memory
        budget = budget or Budget()
        self._grow(budget.block_seconds)
        self.warmup_blocks = self._warm_up(budget.warmup_seconds)
        self._grow(budget.block_seconds)  # calls are faster after the warm-up

    def run_block(self) -> None:
        """Times one block and counts it."""
        self.block_seconds.append(self._time_block() / self._parts)

    @property
    def median(self) -> float:
        """Median of the blocks, in seconds."""
        return float(np.median(self.block_seconds))

    def timing(self) -> dict[str, Any]:
        """Returns the statistics as plain values."""
        return summary(self.block_seconds) | {
            "first_seconds": self.first_seconds,
            "calls_per_block": self.calls_per_block,
            "warmup_blocks": self.warmup_blocks,
        }

    def _time_block(self) -> float:
        """Returns the mean seconds of the calls of one block."""
        call, calls = self.call, range(self.calls_per_block)
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

    def _warm_up(self, max_seconds: float) -> int:
        """Runs blocks until two in a row agree, and returns their number."""
        end = time.perf_counter() + max_seconds
        last, this, blocks = 0.0, self._time_block(), 1
        while abs(this - last) > _AGREEMENT * max(this, last) and time.perf_counter() < end:
            last, this, blocks = this, self._time_block(), blocks + 1
        return blocks


def run_interleaved(turns: Sequence[Callable[[], Any]], *, blocks: int, seed: int) -> None:
    """Makes each of the calls `blocks` times, in turns, in a new random order for each round.

    A slow phase of the machine then affects all of them alike.
    """
    order, generator = list(turns), random.Random(seed)
    for _ in range(blocks):
        generator.shuffle(order)
        for run in order:
            run()


def summary(block_seconds: Sequence[float]) -> dict[str, Any]:
    """Returns median, quartiles and number of blocks."""
    low, median, high = (float(each) for each in np.percentile(block_seconds, [25, 50, 75]))
    return {
        "median_seconds": median,
        "quartiles_seconds": [low, high],
        "blocks": len(block_seconds),
    }
