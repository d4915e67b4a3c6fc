"""Timing: on a clock that the test moves, and with statistics of known samples."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.benchmark import timing
from trainer.benchmark.timing import Budget, Measurement, run_interleaved, summary


class Device:
    """A device that executes calls later, with its own clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: Callable[[int], float]) -> None:
        self.now = 0.0
        self.pending: list[float] = []
        self.calls = 0
        self._costs = costs
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=self._read))

    def _read(self) -> float:
        self.now += 1e-7
        return self.now

    def call(self) -> None:
        self.now += 1e-6  # a call returns after a microsecond
        self.pending.append(self._costs(self.calls))
        self.calls += 1

    def wait(self) -> None:
        self.now += sum(self.pending)
        self.pending.clear()


def test_measurement_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that does not wait would report a microsecond."""
    device = Device(monkeypatch, lambda n: 0.5 if n == 0 else 0.004)
    device.pending.append(9.0)  # earlier work does not count
    measurement = Measurement(device.call, device.wait)
    for _ in range(9):
        measurement.run_block()
    found = measurement
    assert found.first_seconds == pytest.approx(0.5, rel=1e-4)
    assert found.median == pytest.approx(0.004001, rel=1e-4)
    assert found.calls_per_block == 5  # 20 ms
    assert (found.warmup_blocks, found.timing()["blocks"]) == (2, 9)


def test_a_block_has_many_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, lambda _: 1e-7)
    measurement = Measurement(device.call, device.wait, Budget(block_seconds=1e-3))
    measurement.run_block()
    assert measurement.calls_per_block * measurement.median > 1e-3
    assert measurement.median == pytest.approx(1.1e-6, rel=0.01)


def test_warm_up_ends_when_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, lambda n: 0.03 * (1 + 10 / (1 + n)))
    measurement = Measurement(device.call, device.wait)
    measurement.run_block()
    found = measurement
    assert found.warmup_blocks > 5
    assert found.median < 0.06
    alternating = Device(monkeypatch, lambda n: 0.03 * (1 + n % 2))
    measurement = Measurement(alternating.call, alternating.wait, Budget(warmup_seconds=1))
    assert measurement.warmup_blocks > 10  # until the time is over


def test_timing_of_a_part_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, lambda n: 5.0 if n == 0 else 0.2)
    measurement = Measurement(device.call, device.wait, parts=10)
    measurement.run_block()
    assert measurement.median == pytest.approx(0.02, rel=1e-3)
    assert measurement.first_seconds == pytest.approx(5.0, rel=1e-3)
    assert measurement.call_seconds == pytest.approx(0.2, rel=1e-3)


def test_summary_has_median_and_quartiles() -> None:
    expected = {"median_seconds": 3.0, "quartiles_seconds": [2.0, 4.0], "blocks": 5}
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == expected


def test_measurements_run_in_turns_in_a_changing_order() -> None:
    order: list[str] = []
    entries: Any = [lambda n=n: order.append(n) for n in "abc"]
    run_interleaved(entries, blocks=20, seed=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    before = list(order)
    order.clear()
    run_interleaved(entries, blocks=20, seed=1)
    assert order == before
