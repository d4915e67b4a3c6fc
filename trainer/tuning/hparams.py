"""The search on TensorBoard's HParams page: the domains, and a session for each trial."""

import json
import shutil
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api

from trainer.tuning.config import Parameter
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.space import searched


def write_domains(search: SearchDirectory, metrics: Sequence[str]) -> None:
    """Writes the search space and the names of the metrics, once for a search.

    Args:
        search: The search.
        metrics: Names of the validation metrics, including the objective.
    """
    if any(search.tensorboard.glob("*.tfevents.*")):
        return
    space = searched(search.config)
    domains = [api.HParam(_title(key, space[key]), _domain(space[key])) for key in space]
    ordered = sorted(metrics, key=lambda name: name != search.tuning.objective)
    columns = [api.Metric(name) for name in [*ordered, "seconds"]]
    with tf.summary.create_file_writer(str(search.tensorboard)).as_default(step=0):
        api.hparams_config(hparams=domains, metrics=columns)


def write_session(search: SearchDirectory, record: TrialRecord, begin: float) -> None:
    """Writes the row of a trial, and replaces an existing one.

    Args:
        search: The search.
        record: Result of the trial. A failed trial gets no metrics and no end.
        begin: Start of the trial, or of its continuation, in seconds since 1970.
    """
    path = search.tensorboard / record.trial
    shutil.rmtree(path, ignore_errors=True)
    row = {
        _title(key, parameter): _encode(record.shown_values[key], parameter)
        for key, parameter in searched(search.config).items()
        if key in record.shown_values
    }
    # The name of the search is part of the ID: the page can show several searches together.
    trial_id = f"{search.name}-{record.trial}"
    writer = tf.summary.create_file_writer(str(path))
    with writer.as_default(step=record.trained_epochs):
        api.hparams(row, trial_id=trial_id, start_time_secs=begin)
        if record.status == "failed":
            return
        for name, value in {**record.scores, "seconds": record.seconds}.items():
            if value is not None:
                tf.summary.scalar(name, value)
        api.KerasCallback(writer, row, trial_id).on_train_end()


def _is_numeric(parameter: Parameter) -> bool:
    values = parameter.values()
    return values is None or all(type(value) in (int, float) for value in values)


def _title(key: str, parameter: Parameter) -> str:
    """Returns the column of a key.

    The page shows all searches together and cannot sort numbers with text, but an option may be a
    number in one search and text in another.
    """
    return f"{key} (text)" if ".options." in key and not _is_numeric(parameter) else key


def _encode(value: Any, parameter: Parameter) -> Any:
    """Returns a value as a number if all values of the parameter are numbers, else as text."""
    if _is_numeric(parameter):
        return float(value)
    return value if isinstance(value, str) else json.dumps(value)


def _domain(parameter: Parameter) -> Any:
    values = parameter.values()
    if values is None:
        return api.RealInterval(float(parameter.low or 0), float(parameter.high or 0))
    return api.Discrete([_encode(value, parameter) for value in values])
