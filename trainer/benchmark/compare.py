"""Compares two results of a benchmark: what changed beyond noise."""

import json
from pathlib import Path
from typing import Any

from trainer.errors import CheckError, InputError, expect


def read_document(path: Path) -> dict[str, Any]:
    """Reads the JSON document of an earlier result.

    Raises:
        InputError: The file is missing, or is not the result of a benchmark.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _timings(document)
        str(document["benchmark"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"--compare: {path} is not the result of a benchmark of this version ({error!r})"
        raise InputError(message) from None
    return document


def compare(old: dict[str, Any], new: dict[str, Any], *, tolerance: float) -> list[str]:
    """Compares the medians of two documents of the same benchmark.

    A measurement changed if its interquartile ranges do not overlap.

    Returns:
        A line for each measurement that changed.

    Raises:
        InputError: They are of different benchmarks, or have no measurement in common.
        CheckError: A measurement is slower by more than `tolerance`, beyond its quartiles.
    """
    expected, received = new["benchmark"], old["benchmark"]
    expect(received == expected, "--compare", f"a result of {expected}", f"one of {received}")
    before, after = _timings(old), _timings(new)
    common = [row["key"] for row in new["rows"] if row["key"] in before]
    expect(common, "--compare", "a measurement of both results", "none in common")
    lines, slower = [], []
    for key in common:
        (low, median, high), (new_low, new_median, new_high) = before[key], after[key]
        if new_low > high or low > new_high:
            lines.append(f"{key}: {new_median / median:.2f} times the earlier duration")
        if new_low > high * (1 + tolerance):
            slower.append(lines[-1])
    if slower:
        raise CheckError(f"slower by more than {tolerance:.0%}: {'; '.join(slower)}")
    return lines or [f"no change beyond noise in {len(common)} measurements"]


def _timings(document: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Returns the quartiles of each row by its key, in seconds."""
    found = {}
    for row in document["rows"]:
        low, high = row["timing"]["quartiles_seconds"]
        found[row["key"]] = (float(low), float(row["timing"]["median_seconds"]), float(high))
    return found
