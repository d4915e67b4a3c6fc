"""Crossovers between two devices, and comparison of two results."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from trainer.benchmark.compare import compare, read_document
from trainer.benchmark.curves import Crossover, Curves, find_crossover
from trainer.benchmark.timing import Timing
from trainer.errors import CheckError, InputError

SIZES = [1, 10, 100, 1000]


def timings(seconds: list[float], spread: float = 0.01) -> list[Timing]:
    generator = np.random.default_rng(1)
    return [Timing(list(s * generator.normal(1, spread, 21))) for s in seconds]


def test_crossover_is_the_size_from_which_the_second_device_is_faster() -> None:
    first = timings([1e-6 * n for n in SIZES])  # grows with n
    second = timings([50e-6] * 4)  # a constant cost
    found = find_crossover(SIZES, first, second, seed=0)
    assert found.size == pytest.approx(50, rel=0.02)
    assert found.interval is not None
    low, high = found.interval
    assert low < 50 < high
    assert high / low < 1.1
    assert found.describe("n").startswith("faster from n ")
    assert "95% interval" in found.describe("n")
    wide = find_crossover(SIZES, timings([1e-6 * n for n in SIZES], 0.3), second, seed=0)
    assert wide.interval is not None
    assert wide.interval[1] / wide.interval[0] > high / low


@pytest.mark.parametrize(
    ("second", "spread", "reason"),
    [
        (1.0, 0.01, "not faster at the largest size"),
        (1e-9, 0.01, "faster at every size"),
        (0.99e-3, 0.3, "neither is reliably faster: the timings overlap"),
        (1.01e-3, 0.3, "neither is reliably faster: the timings overlap"),
    ],
)
def test_an_uncertain_or_missing_crossover_has_a_reason(
    second: float, spread: float, reason: str
) -> None:
    first = timings([1e-3] * 4, spread)
    found = find_crossover(SIZES, first, timings([second] * 4, spread), seed=0)
    assert found == Crossover(None, None, reason)
    assert found.describe("n") == reason


def test_crossovers_compare_the_first_device_with_each_other_device() -> None:
    def curve(device: str, label: str, seconds: list[float]) -> list[Any]:
        found: list[Any] = timings(seconds)
        for n, timing in zip(SIZES, found, strict=True):
            timing.row = {"device": device, "label": label, "batch_size": n}
        return found

    slow, flat = [1e-6 * n for n in SIZES], [50e-6] * 4
    entries = [
        *curve("CPU:0", "dot/float32", slow),
        *curve("GPU:0", "dot/float32", flat),
        *curve("GPU:0", "dot/tf32", [0.5e-6 * n for n in SIZES]),  # compared with float32
        *curve("GPU:0", "dot/float16", flat),  # the CPU has no such curve
    ]
    curves = Curves(entries, "batch_size", lambda row: str(row["label"]), first="CPU:0", seed=0)
    found = curves.facts()["crossovers"]
    assert list(found) == ["dot/float32/CPU:0/GPU:0", "dot/tf32/CPU:0/GPU:0"]
    assert found["dot/float32/CPU:0/GPU:0"]["size"] == pytest.approx(50, rel=0.02)
    lines = curves.notes()
    assert lines[0].startswith("dot, float32: GPU:0 compared with CPU:0: faster from batch size 5")
    assert lines[1] == "dot, tf32: GPU:0 compared with CPU:0: faster at every size"
    axes = Figure().subplots()
    curves.draw(axes, "dot")
    assert len(axes.lines) == 4 + 1  # only a certain crossover is drawn
    assert [line.get_linestyle() for line in axes.lines[:4]] == ["-", "-", "--", "-."]
    assert {line.get_marker() for line in axes.lines[:4]} == {"."}
    axes = Figure().subplots()
    curves.draw(axes, "dot/tf32", mark="dot/tf32")
    assert len(axes.lines) == 1


def document(rows: dict[str, float], baselines: dict[str, float]) -> dict[str, Any]:
    """Returns a document of a quiet machine: intervals of 2% of the median."""

    def timing(seconds: float) -> dict[str, Any]:
        interval = [0.99 * seconds, 1.01 * seconds]
        return {"median_seconds": seconds, "interval_seconds": interval}

    return {
        "benchmark": "matmul",
        "rows": [{"key": key, "timing": timing(seconds)} for key, seconds in rows.items()],
        "baselines": {key: timing(seconds) for key, seconds in baselines.items()},
    }


def slower(by: float, *, baselines: float = 1.0) -> dict[str, Any]:
    return document({"small": 1e-6 * by, "large": 0.2 * by}, {"numpy": 0.1 * baselines})


def test_a_slowdown_of_a_fifth_is_reported_and_noise_is_not() -> None:
    old = slower(1.0)
    lines = compare(old, slower(1.01), tolerance=0.1)
    assert lines[0] == "no change beyond noise in 2 measurements"
    with pytest.raises(CheckError, match=r"slower by more than 10%.* 1\.20 times the earlier"):
        compare(old, slower(1.2), tolerance=0.1)
    assert "small: 1.20 times the earlier duration" in compare(old, slower(1.2), tolerance=0.3)
    assert "large: 0.50 times the earlier duration" in compare(old, slower(0.5), tolerance=0.1)
    # If the baselines are slower too, the machine is slower, not the program.
    lines = compare(old, slower(1.5, baselines=1.5), tolerance=0.1)
    assert lines[0] == "no change beyond noise in 2 measurements"
    assert "the baselines took 1.50 times as long" in lines[1]


def test_documents_of_earlier_versions_can_be_compared(tmp_path: Path) -> None:
    old = slower(1.0)
    old["references"] = old.pop("baselines")
    old["rows"][0]["timing"]["calls_a_block"] = 3
    (tmp_path / "old.json").write_text(json.dumps(old))
    lines = compare(read_document(tmp_path / "old.json"), slower(1.5, baselines=1.5), tolerance=0.1)
    assert "the baselines took 1.50 times as long" in lines[-1]


def test_results_of_other_benchmarks_are_refused() -> None:
    old = slower(1.0)
    with pytest.raises(InputError, match="expected a result of matmul, received one of formats"):
        compare(old | {"benchmark": "formats"}, old, tolerance=0.1)
    with pytest.raises(InputError, match="no measurement in common"):
        compare(old | {"rows": []}, old, tolerance=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"baselines": {"a": {}}},
        {"baselines": {"a": {"median_seconds": 0}}},
        {"references": {"a": {"median_seconds": 0}}},
        {"baselines": None},
        {"baselines": [1]},
        {"baselines": {"a": 1}},
        {"rows": [{"key": "a", "timing": {"median_seconds": 1, "interval_seconds": [2, 3]}}]},
        {"rows": [{"key": "a"}]},
    ],
)
def test_damaged_documents_are_refused(tmp_path: Path, change: Any) -> None:
    damaged = copy.deepcopy({"benchmark": "matmul", "rows": []}) | change
    (tmp_path / "old.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match="is not the result of a benchmark"):
        read_document(tmp_path / "old.json")
