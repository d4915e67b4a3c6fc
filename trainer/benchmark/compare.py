"""Says what changed between two results of a benchmark, beyond noise."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import CheckError, InputError


def read_document(path: Path) -> dict[str, Any]:
    """Reads the JSON file of an earlier result.

    Raises:
        InputError: It is missing, or no result of a benchmark.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        _timings(document)
        _references(document)
        str(document["benchmark"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"--compare: {path} is no result of a benchmark ({reason})") from None
    return dict(document)


def compare(old: dict[str, Any], new: dict[str, Any], *, tolerance: float) -> list[str]:
    """Compares the medians of two results, figure by figure.

    A figure moved when the 95% intervals of its medians lie apart. What the machine itself can do
    is measured in each result: its drift between the two is taken out first.

    Args:
        old: An earlier document.
        new: A later one, of the same benchmark.
        tolerance: The largest share by which a figure may be slower.

    Returns:
        A line for each figure that moved; one that says so where none did.

    Raises:
        InputError: They are of different benchmarks, or have no figure in common.
        CheckError: A figure is slower by more than `tolerance`, by intervals.
    """
    if old["benchmark"] != new["benchmark"]:
        raise InputError(
            f"--compare: expected a result of {new['benchmark']}, received one of "
            f"{old['benchmark']}"
        )
    before, after = _timings(old), _timings(new)
    common = [key for key in after if key in before]
    if not common:
        raise InputError("--compare: the two results have no figure in common")
    drift = _drift(_references(old), _references(new))
    lines, slower = [], []
    for key in common:
        low, high = (drift * seconds for seconds in before[key]["interval_seconds"])
        new_low, new_high = after[key]["interval_seconds"]
        if new_low <= high and low <= new_high:
            continue
        ratio = after[key]["median_seconds"] / (drift * before[key]["median_seconds"])
        lines.append(f"{key}: {ratio:.2f} times the time it took")
        if new_low > high * (1 + tolerance):
            slower.append(lines[-1])
    told = f"this machine takes {drift:.2f} times as long as it did, by its references"
    if slower:
        raise CheckError(
            f"slower by more than {tolerance:.0%}: {'; '.join(slower)}; {told}, which is taken out"
        )
    if not lines:
        return [f"nothing moved beyond noise, of {len(common)} figures; {told}"]
    return [*lines, told + ", which is taken out above"]


def _timings(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the timing of each row by its key."""
    found = {str(row["key"]): row["timing"] for row in document["rows"]}
    for timing in found.values():
        low, high = timing["interval_seconds"]
        if not 0 < low <= timing["median_seconds"] <= high < math.inf:
            raise ValueError("a timing whose median lies outside of its interval")
    return found


def _references(document: dict[str, Any]) -> dict[str, float]:
    """Returns the median of each reference, in seconds, by its key."""
    found = {}
    for key, timing in document.get("references", {}).items():
        found[key] = float(timing["median_seconds"])
        if not 0 < found[key] < math.inf:
            raise ValueError("a reference that took no time")
    return found


def _drift(old: dict[str, float], new: dict[str, float]) -> float:
    """Returns how much longer the references take; 1 where there are none in common."""
    ratios = [new[key] / old[key] for key in new if key in old]
    return float(np.median(ratios)) if ratios else 1.0
