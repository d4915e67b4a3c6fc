"""Compares two results of a benchmark: what changed beyond noise."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import CheckError, InputError


def read_document(path: Path) -> dict[str, Any]:
    """Reads the JSON document of an earlier result, of this version or an earlier one.

    Raises:
        InputError: The file is missing, or is not the result of a benchmark.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        _timings(document)
        _baselines(document)
        str(document["benchmark"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"missing key {error}" if isinstance(error, KeyError) else error
        message = f"--compare: {path} is not the result of a benchmark ({reason})"
        raise InputError(message) from None
    return dict(document)


def compare(old: dict[str, Any], new: dict[str, Any], *, tolerance: float) -> list[str]:
    """Compares the medians of two documents of the same benchmark.

    A measurement changed if its interquartile ranges do not overlap. Each document has baselines
    of the machine itself: their change, the drift, is removed first.

    Args:
        old: The earlier document.
        new: The later document.
        tolerance: The largest accepted slowdown, as a fraction.

    Returns:
        A line for each measurement that changed, and a line about the drift.

    Raises:
        InputError: They are of different benchmarks, or have no measurement in common.
        CheckError: A measurement is slower by more than `tolerance`, beyond its quartiles.
    """
    if old["benchmark"] != new["benchmark"]:
        raise InputError(
            f"--compare: expected a result of {new['benchmark']}, received one of "
            f"{old['benchmark']}"
        )
    before, after = _timings(old), _timings(new)
    common = [key for key in after if key in before]
    if not common:
        raise InputError("--compare: the two results have no measurement in common")
    old_baselines, baselines = _baselines(old), _baselines(new)
    ratios = [baselines[key] / old_baselines[key] for key in baselines if key in old_baselines]
    drift = float(np.median(ratios)) if ratios else 1.0
    lines, slower = [], []
    for key in common:
        median, low, high = (drift * seconds for seconds in before[key])
        new_median, new_low, new_high = after[key]
        if new_low > high or low > new_high:
            lines.append(f"{key}: {new_median / median:.2f} times the earlier duration")
        if new_low > high * (1 + tolerance):
            slower.append(lines[-1])
    machine = f"the baselines took {drift:.2f} times as long; this drift is removed"
    if slower:
        raise CheckError(f"slower by more than {tolerance:.0%}: {'; '.join(slower)}; {machine}")
    return [*(lines or [f"no change beyond noise in {len(common)} measurements"]), machine]


def _timings(document: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Returns median and quartiles of each row by its key, in seconds."""
    found = {}
    for row in document["rows"]:
        median, (low, high) = row["timing"]["median_seconds"], row["timing"]["quartiles_seconds"]
        if not 0 < low <= median <= high < math.inf:
            raise ValueError("a median is outside its quartiles")
        found[str(row["key"])] = (median, low, high)
    return found


def _baselines(document: dict[str, Any]) -> dict[str, float]:
    """Returns the median of each baseline by its key, in seconds."""
    # Before version 0.2, documents called them "references".
    timings = document.get("baselines", document.get("references", {}))
    found = {key: float(timing["median_seconds"]) for key, timing in timings.items()}
    if not all(0 < seconds < math.inf for seconds in found.values()):
        raise ValueError("expected baselines of more than 0 s")
    return found
