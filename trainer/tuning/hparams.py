"""A trial as a row of TensorBoard's HParams page."""

import json
import shutil
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api

from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.space import searched


def write_session(search: SearchDirectory, record: TrialRecord, begin: float) -> None:
    """Writes the row of a trial, and replaces an existing one.

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
