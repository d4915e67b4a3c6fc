"""Crossovers between two devices, and comparison of two results."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from trainer.benchmark.compare import compare, read_document
from trainer.benchmark.curves import crossover_notes, draw_curves, find_crossovers
from trainer.errors import CheckError, InputError

SIZES = [1, 10, 100, 1000]


def curve(device: str, label: str, seconds: list[float], spread: float = 0.01) -> list[Any]:
    """Returns rows whose quartiles differ from the median by a fraction."""
    return [
        {
            "device": device,
            "label": label,
            "batch_size": n,
            "timing": {
                "median_seconds": s,
                "quartiles_seconds": [s * (1 - spread), s * (1 + spread)],
            },
        }
        for n, s in zip(SIZES, seconds, strict=True)
    ]


@pytest.mark.parametrize(
    ("second", "spread", "size", "reason"),
    [
        ([50e-6] * 4, 0.01, 100, "faster from batch size 100, not yet reliably at 10"),
        ([50e-6] * 4, 0.5, 1000, "faster from batch size 1,000, not yet reliably at 100"),
        ([1.0] * 4, 0.01, None, "not faster at the largest size"),
        ([1e-9] * 4, 0.01, None, "faster at every size"),
        ([0.99e-3] * 4, 0.3, None, "neither is reliably faster: the quartiles overlap"),
        ([1.01e-3] * 4, 0.3, None, "neither is reliably faster: the quartiles overlap"),
    ],
)
def test_crossover_is_the_size_from_which_the_second_device_is_faster(
    second: list[float], spread: float, size: int | None, reason: str
) -> None:
    rows = curve("CPU:0", "dot/float32", [1e-6 * n for n in SIZES], spread)
    rows += curve("GPU:0", "dot/float32", second, spread)
    found = find_crossovers(rows, "batch_size", first="CPU:0")
    assert found == {"dot/float32/CPU:0/GPU:0": {"size": size, "reason": reason}}


def test_crossovers_compare_the_first_device_with_each_other_device() -> None:
    slow, flat = [1e-6 * n for n in SIZES], [50e-6] * 4
    rows = [
        *curve("CPU:0", "dot/float32", slow),
        *curve("GPU:0", "dot/float32", flat),
        *curve("GPU:0", "dot/tf32", [0.5e-6 * n for n in SIZES]),  # compared with float32
        *curve("GPU:0", "dot/float16", flat),  # the CPU has no such curve
    ]
    found = find_crossovers(rows, "batch_size", first="CPU:0")
    assert list(found) == ["dot/float32/CPU:0/GPU:0", "dot/tf32/CPU:0/GPU:0"]
    lines = crossover_notes(found)
    assert lines[0].startswith("dot, float32: GPU:0 compared with CPU:0: faster from batch size 1")
    assert lines[1] == "dot, tf32: GPU:0 compared with CPU:0: faster at every size"
    axes = Figure().subplots()
    draw_curves(axes, rows, "batch_size", found)
    assert len(axes.lines) == 4 + 1  # only a size is drawn
    assert [line.get_linestyle() for line in axes.lines[:4]] == ["-", "-", "--", "-."]
    assert {line.get_marker() for line in axes.lines[:4]} == {"."}


def document(rows: dict[str, float], baselines: dict[str, float]) -> dict[str, Any]:
    """Returns a document of a quiet machine: quartiles within 1% of the median."""

    def timing(seconds: float) -> dict[str, Any]:
        quartiles = [0.99 * seconds, 1.01 * seconds]
        return {"median_seconds": seconds, "quartiles_seconds": quartiles}

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
    old["rows"][0]["timing"]["interval_seconds"] = [0.99e-6, 1.01e-6]
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
        {"rows": [{"key": "a", "timing": {"median_seconds": 1, "quartiles_seconds": [2, 3]}}]},
        {"rows": [{"key": "a"}]},
    ],
)
def test_damaged_documents_are_refused(tmp_path: Path, change: Any) -> None:
    damaged = copy.deepcopy({"benchmark": "matmul", "rows": []}) | change
    (tmp_path / "old.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match="is not the result of a benchmark"):
        read_document(tmp_path / "old.json")
