"""TensorBoard's HParams page of a search: one session for each trial."""

import json
import shutil
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api

from trainer.tuning.config import Parameter
from trainer.tuning.search_directory import SearchDirectory, TrialRecord


def write_session(search: SearchDirectory, record: TrialRecord) -> None:
    """Writes a trial as a row of the page, and replaces an existing row."""
    path, space = search.tensorboard / record.trial, search.tuning.space
    shutil.rmtree(path, ignore_errors=True)
    if search.tuning.algorithm == "hyperband":
        space = space | {"training.epochs": Parameter(low=0, high=record.epochs)}
    columns, row = [], {}
    for key, parameter in space.items():
        values = parameter.values()
        numeric = values is None or all(type(value) in (int, float) for value in values)
        # The page shows all searches together and cannot sort numbers with text, but an option may
        # be a number in one search and text in another.
        columns.append(f"{key} (text)" if ".options." in key and not numeric else key)
        value = record.shown_values.get(key)
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            row[columns[-1]] = float(value) if numeric else text
    objective = search.tuning.objective
    scores: dict[str, Any] = {objective: record.score, **record.scores, "seconds": record.seconds}
    writer = tf.summary.create_file_writer(str(path))
    with writer.as_default(step=record.trained_epochs):
        # TensorBoard reads the columns of one trial, so every trial has all of them.
        metrics = [api.Metric(name) for name in scores]
        api.hparams_config(hparams=[api.HParam(name) for name in columns], metrics=metrics)
        # The name of the search is part of the ID: the page can show several searches together.
        session = api.KerasCallback(writer, row, trial_id=f"{search.name}-{record.trial}")
        session.on_train_begin()
        if record.status == "failed":
            return  # a row without metrics and without an end
        for name, value in scores.items():
            if value is not None:
                tf.summary.scalar(name, value)
        session.on_train_end()
