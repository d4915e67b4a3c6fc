"""Compares runs: what differs, and whether a difference in test accuracy is significant."""

import contextlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trainer.config_file import flatten
from trainer.errors import expect
from trainer.runs.records import RunRecord

_LEVEL = 0.05  # probability of a false "significant", of all comparisons together
_NAMES = ("logging.name", "logging.directory")  # always differ
_SCORES = ("state", "epochs", "parameters", "val_", "test_")


class Predictions(NamedTuple):
    """Number of correct test images; with predictions, labels (int [n]) and hits (bool [n])."""

    correct: int
    images: int
    data: str  # fingerprint
    labels: NDArray[Any] = np.empty(0)
    hits: NDArray[Any] = np.empty(0)

    def interval(self, level: float = _LEVEL) -> tuple[float, float]:
        """Returns the interval of the accuracy by Wilson (1927), "Probable inference"."""
        found = stats.binomtest(self.correct, self.images).proportion_ci(1 - level, "wilson")
        return float(found.low), float(found.high)


def compare_runs(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns what differs between two runs or more.

    Returns:
        "configuration", "environment", "scores", "times": a list of values for each key that
        differs. "test_accuracy": a row for each run; with test scores, its interval and the result
        of `compare_accuracy` with the first run that has test scores.
    """
    expect(len(records) > 1, "trainer runs compare", "two runs or more", len(records))
    rows: list[dict[str, Any]] = [{"run": record.run.name} for record in records]
    results = [read_predictions(record) for record in records]
    scored = [(row, result) for row, result in zip(rows, results, strict=True) if result]
    for row, result in scored:
        low, high = result.interval()
        row |= {"accuracy": result.correct / result.images, "low": low, "high": high}
        if row is not scored[0][0]:
            # Bonferroni's correction: several comparisons find more differences by chance.
            row |= compare_accuracy(scored[0][1], result, _LEVEL / (len(scored) - 1))
    environments = [record.run.read_json("environment.json") for record in records]
    return {
        "runs": [record.run.name for record in records],
        "configuration": _differing([record.config for record in records]),
        "environment": _differing([flatten(each) for each in environments]),
        "scores": _differing([record.columns for record in records], _SCORES),
        "times": _differing([record.columns for record in records], ("step_ms", "seconds")),
        "test_accuracy": rows,
    }


def read_predictions(record: RunRecord) -> Predictions | None:
    """Reads the predictions of a run, else its test accuracy. None: it has neither."""
    facts = flatten(record.summary)
    images, data = facts.get("test_images"), facts.get("data.fingerprint", "")
    # Runs of earlier versions have no predictions.
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(record.run.path / "predictions.npz", allow_pickle=False) as saved:
            labels, hits = saved["labels"], saved["labels"] == saved["predicted"]
        if len(labels) == images:
            return Predictions(int(hits.sum()), images, data, labels, hits)
    accuracy = record.columns.get("test_accuracy")
    if images is None or accuracy is None:
        return None
    return Predictions(round(accuracy * images), images, data)


def compare_accuracy(one: Predictions, other: Predictions, level: float = _LEVEL) -> dict[str, Any]:
    """Tests whether the difference between two test accuracies is significant.

    With predictions of the same images: McNemar's exact test, a binomial test of the images that
    only one network classifies correctly (McNemar 1947, Psychometrika 12). Dietterich (1998),
    Neural Computation 10, recommends it for networks that are trained once. It compares networks,
    not recipes: other seeds give other networks.

    Otherwise: the interval of the difference, from two Wilson intervals, as if the images were
    independent (Newcombe 1998, Statistics in Medicine 17:873-890, method 10).
    """
    first, second = one.correct / one.images, other.correct / other.images
    result: dict[str, Any] = {"difference": second - first, "same_data": one.data == other.data}
    if result["same_data"] and len(one.labels) and np.array_equal(one.labels, other.labels):
        gained, lost = int((other.hits & ~one.hits).sum()), int((one.hits & ~other.hits).sum())
        p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        result |= {"method": "McNemar", "p_value": p, "significant": p < level}
        return result | {"only_this": gained, "only_first": lost}
    (low, high), (below, above) = one.interval(level), other.interval(level)
    least = second - first - float(np.hypot(second - below, high - first))
    most = second - first + float(np.hypot(above - second, first - low))
    result |= {"method": "Wilson", "difference_low": least, "difference_high": most}
    return result | {"significant": not least <= 0 <= most}


def _differing(
    tables: Sequence[Mapping[str, Any]], prefixes: str | tuple[str, ...] = ""
) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for table in tables for key in table if key.startswith(prefixes))
    rows = {key: [table.get(key) for table in tables] for key in keys if key not in _NAMES}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
