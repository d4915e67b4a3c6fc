"""Comparison of two results."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.benchmark.compare import compare, read_document
from trainer.errors import CheckError, InputError


def document(rows: dict[str, float]) -> dict[str, Any]:
    """Returns a document of a quiet machine: quartiles within 1% of the median."""

    def timing(seconds: float) -> dict[str, Any]:
        quartiles = [0.99 * seconds, 1.01 * seconds]
        return {"median_seconds": seconds, "quartiles_seconds": quartiles}

    return {
        "benchmark": "matmul",
        "rows": [{"key": key, "timing": timing(seconds)} for key, seconds in rows.items()],
    }


def slower(by: float) -> dict[str, Any]:
    return document({"small": 1e-6 * by, "large": 0.2 * by})


def test_a_slowdown_of_a_fifth_is_reported_and_noise_is_not() -> None:
    old = slower(1.0)
    lines = compare(old, slower(1.01), tolerance=0.1)
    assert lines == ["no change beyond noise in 2 measurements"]
    with pytest.raises(CheckError, match=r"slower by more than 10%.* 1\.20 times the earlier"):
        compare(old, slower(1.2), tolerance=0.1)
    assert "small: 1.20 times the earlier duration" in compare(old, slower(1.2), tolerance=0.3)
    assert "large: 0.50 times the earlier duration" in compare(old, slower(0.5), tolerance=0.1)


def test_results_of_other_benchmarks_are_refused() -> None:
    old = slower(1.0)
    other = slower(1.0) | {"benchmark": "formats"}
    with pytest.raises(InputError, match="expected a result of formats, received one of matmul"):
        compare(old, other, tolerance=0.1)
    with pytest.raises(InputError, match="none in common"):
        compare(old, slower(1.0) | {"rows": []}, tolerance=0.1)


@pytest.mark.parametrize("rows", [[{"key": "a"}], [{"key": "a", "timing": {}}], None, [1], 3])
def test_damaged_documents_are_refused(tmp_path: Path, rows: Any) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"benchmark": "matmul", "rows": rows}))
    with pytest.raises(InputError, match="is not the result of a benchmark of this version"):
        read_document(tmp_path / "old.json")
