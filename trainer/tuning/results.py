"""What came of a search: the table, what mattered, and the best configuration."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Config
from trainer.errors import CheckError
from trainer.files import write_text
from trainer.tuning.config import TuningConfig
from trainer.tuning.folder import Record, SearchFolder, ranked
from trainer.tuning.space import trial_config, values_of

_TREES = 100
_REPEATS = 10
# Trials for each parameter, below which the order of importances changes from search to search.
_TRIALS_A_PARAMETER = 4
_EXPLAINED = 0.3  # of the scores' variance, below which what a forest learned is mostly noise


def write_best(folder: SearchFolder, config: Config) -> None:
    """Writes best.toml: the best trial's configuration, as `trainer fit` takes it."""
    records = folder.records()
    best = next(iter(ranked(records, config.table(TuningConfig).direction)), None)
    if best is None:
        return
    tuning = config.table(TuningConfig)
    epochs = best.epochs if tuning.algorithm == "hyperband" else None
    of = f", mean of {tuning.executions_per_trial} seeds" if tuning.executions_per_trial > 1 else ""
    head = (
        f"# Trial {best.trial} of tune-{folder.name}, the best of {len(records)}: "
        f"{tuning.objective} {best.score:.6g}{of}.\n"
    )
    write_text(folder.best, head + trial_config(config, best.values, epochs).to_toml())


def write_results(folder: SearchFolder, config: Config) -> dict[str, Any]:
    """Writes results.json and best.toml, and returns the former's content.

    Raises:
        CheckError: No trial has a score.
    """
    records, tuning = folder.records(), config.table(TuningConfig)
    best = next(iter(ranked(records, tuning.direction)), None)
    if best is None:
        raise CheckError(f"none of {len(records)} trials came to an end with a score")
    write_best(folder, config)
    importance, note = importances(config, records)
    document: dict[str, Any] = {
        "search": str(folder.path),
        "objective": tuning.objective,
        "direction": tuning.direction,
        "algorithm": tuning.algorithm,
        "best": asdict(best) | {"config": str(folder.best)},
        "importance": importance,
        "importance_note": note,
        "seconds": folder.seconds(),
        "trials": [asdict(record) for record in records],
    }
    folder.write_json("results.json", document)
    return document


def importances(config: Config, records: list[Record]) -> tuple[dict[str, float] | None, str]:
    """Says how much each parameter mattered to the score.

    A random forest learns the score from the values; a parameter's importance is what the forest's
    error grows by when that parameter's values are shuffled among the trials (Breiman 2001, as
    scikit-learn's permutation_importance computes it), as a share of all.

    Args:
        config: Of the search.
        records: Its trials.

    Returns:
        Shares by key, the largest first, and how far they can be believed; None where they cannot.
    """
    scored = [record for record in records if record.score is not None]
    keys = list(config.table(TuningConfig).space)
    if config.table(TuningConfig).algorithm == "hyperband":
        keys.append("training.epochs")
    needed = max(10, _TRIALS_A_PARAMETER * len(keys))
    if len(scored) < needed:
        return None, f"{len(scored)} trials with a score are too few to say: expected {needed}"
    columns = np.array([[_number(config, r, key) for key in keys] for r in scored])
    scores = np.array([record.score for record in scored], np.float64)
    if np.ptp(scores) == 0:
        return None, "all scores are the same"
    shares, explained = _forest(columns, scores)
    if explained < _EXPLAINED or shares.sum() <= 0:
        return None, f"a forest explains too little of the scores (out of bag, R2 {explained:.2f})"
    order = np.argsort(-shares, kind="stable")
    found = {keys[i]: float(shares[i] / shares.sum()) for i in order}
    return found, f"{len(scored)} trials, of whose scores a forest explains {explained:.0%}"


def _forest(columns: NDArray[Any], scores: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Returns the importance of each column, and R2 of trials that a tree has not seen."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    forest = RandomForestRegressor(_TREES, oob_score=True, random_state=0).fit(columns, scores)
    result = permutation_importance(forest, columns, scores, n_repeats=_REPEATS, random_state=0)
    return np.maximum(result.importances_mean, 0.0), float(forest.oob_score_)


def _number(config: Config, record: Record, key: str) -> float:
    """Returns a value as a tree can split it; -1 where a condition ruled the parameter out."""
    if key not in config.table(TuningConfig).space:
        return float(record.epochs)
    if key not in record.values:
        return -1.0
    values = values_of(config.table(TuningConfig).space[key])
    value = record.values[key]
    return float(value) if values is None else float(values.index(value))
