"""Results of a search: TensorBoard's HParams page, best.toml, results.json, importances."""

import json
import shutil
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api

from trainer.config import Config
from trainer.errors import CheckError
from trainer.files import write_text
from trainer.tuning.config import Parameter
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.space import searched, trial_config

_TREES = 100
_REPEATS = 10
# With fewer trials per parameter, the order of importances differs between searches.
_MIN_TRIALS_PER_PARAMETER = 4
_MIN_R2 = 0.3  # below this, a forest has learned mostly noise


def write_session(search: SearchDirectory, record: TrialRecord, begin: float) -> None:
    """Writes a trial as a row of the HParams page, and replaces an existing row.

    Args:
        search: The search.
        record: Result of the trial. A failed trial gets no metrics and no end.
        begin: Start of the trial, or of its continuation, in seconds since 1970.
    """
    path = search.tensorboard / record.trial
    shutil.rmtree(path, ignore_errors=True)
    columns, row = [], {}
    for key, parameter in searched(search.config).items():
        values = parameter.values()
        numeric = values is None or all(type(value) in (int, float) for value in values)
        # The page shows all searches together and cannot sort numbers with text, but an option may
        # be a number in one search and text in another.
        columns.append(f"{key} (text)" if ".options." in key and not numeric else key)
        value = record.shown_values.get(key)
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            row[columns[-1]] = float(value) if numeric else text
    # The name of the search is part of the ID: the page can show several searches together.
    trial_id, objective = f"{search.name}-{record.trial}", search.tuning.objective
    scores: dict[str, Any] = {objective: record.score, **record.scores, "seconds": record.seconds}
    writer = tf.summary.create_file_writer(str(path))
    with writer.as_default(step=record.trained_epochs):
        # TensorBoard reads the columns of one trial, so every trial has all of them.
        metrics = [api.Metric(name) for name in scores]
        api.hparams_config(hparams=[api.HParam(name) for name in columns], metrics=metrics)
        api.hparams(row, trial_id=trial_id, start_time_secs=begin)
        if record.status == "failed":
            return
        for name, value in scores.items():
            if value is not None:
                tf.summary.scalar(name, value)
        api.KerasCallback(writer, row, trial_id).on_train_end()


def write_best(search: SearchDirectory) -> None:
    """Writes best.toml, the configuration of the best trial, if a trial has a score."""
    ranked, count = search.ranked(), search.tuning.executions_per_trial
    if not ranked:
        return
    best, mean = ranked[0], f", mean of {count} seeds" if count > 1 else ""
    head = (
        f"# Trial {best.trial} of tune-{search.name}, the best of {len(search.records())}: "
        f"{search.tuning.objective} {best.score:.6g}{mean}.\n"
    )
    write_text(search.best, head + trial_config(search.config, best.shown_values).to_toml())


def write_results(search: SearchDirectory, seconds: float) -> dict[str, Any]:
    """Writes results.json and best.toml, and returns the content of results.json.

    Args:
        search: The search.
        seconds: Time of the search.

    Raises:
        CheckError: No trial has a score.
    """
    records, ranked = search.records(), search.ranked()
    if not ranked:
        raise CheckError(f"none of {len(records)} trials has a score")
    write_best(search)
    importance, note = importances(search.config, records)
    document: dict[str, Any] = {
        "search": str(search.path),
        **search.tuning.model_dump(include={"objective", "direction", "algorithm"}),
        "best": ranked[0].model_dump() | {"config": str(search.best)},
        "importance": importance,
        "importance_note": note,
        "seconds": round(seconds, 1),
        "trials": [record.model_dump() for record in records],
    }
    run = search.refit_run()
    if run.finished:
        summary = run.read_json("summary.json")
        document["refit"] = {key: summary[key] for key in ("run", "test", "test_images")}
    write_text(search.path / "results.json", json.dumps(document, indent=2, allow_nan=False) + "\n")
    return document


def importances(config: Config, records: list[TrialRecord]) -> tuple[dict[str, float] | None, str]:
    """Estimates the influence of each parameter on the score.

    A random forest learns the score from the values. The importance of a parameter is the increase
    of the forest's error when the values of this parameter are shuffled among the trials (Breiman
    2001, scikit-learn's permutation_importance), divided by the sum over all parameters.

    Args:
        config: Configuration of the search.
        records: Trials of the search.

    Returns:
        Fractions by key, the largest first, or None if they are not reliable; and a note on
        reliability.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    scored, space = [record for record in records if record.score is not None], searched(config)
    needed = max(10, _MIN_TRIALS_PER_PARAMETER * len(space))
    if len(scored) < needed:
        return None, f"{len(scored)} trials with a score are too few: expected {needed}"
    columns = [[_number(space[key], r.shown_values.get(key)) for key in space] for r in scored]
    scores = np.array([record.score for record in scored], np.float64)
    if np.ptp(scores) == 0:
        return None, "all scores are the same"
    forest = RandomForestRegressor(_TREES, oob_score=True, random_state=0).fit(columns, scores)
    shuffled = permutation_importance(forest, columns, scores, n_repeats=_REPEATS, random_state=0)
    found, r2 = np.maximum(shuffled.importances_mean, 0.0), forest.oob_score_
    if r2 < _MIN_R2 or found.sum() <= 0:
        return None, f"a forest explains too little of the scores: out-of-bag R2 {r2:.2f}"
    shares = dict(zip(space, (found / found.sum()).tolist(), strict=True))
    largest_first = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return largest_first, f"{len(scored)} trials, out-of-bag R2 {r2:.2f}"


def _number(parameter: Parameter, value: Any) -> float:
    """Returns a value as a number for the forest; -1 if a condition made the key inactive."""
    values = parameter.values()
    if value is None:
        return -1.0
    return float(value) if values is None else float(values.index(value))
