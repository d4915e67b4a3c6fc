"""The search on TensorBoard's HParams page: the domains first, then a session for each trial."""

import json
import shutil
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorboard.plugins.hparams import api, api_pb2, summary

from trainer.config import Config
from trainer.tuning.config import TuningConfig
from trainer.tuning.folder import Record, SearchFolder
from trainer.tuning.space import is_whole, values_of

_EPOCHS = "training.epochs"  # what hyperband chooses besides


def write_domains(folder: SearchFolder, config: Config, metrics: Sequence[str]) -> None:
    """Writes what can be tried and what is measured, once for a search.

    Args:
        folder: Of the search.
        config: Of the search.
        metrics: Names of the validation scores, the objective among them.
    """
    if any(folder.tensorboard.glob("*.tfevents.*")):
        return
    parameters = [
        api.HParam(_name(config, key), _domain(config, key))
        for key in config.table(TuningConfig).space
    ]
    if config.table(TuningConfig).algorithm == "hyperband":
        parameters.append(api.HParam(_EPOCHS, api.IntInterval(1, config.training.epochs)))
    ordered = sorted(metrics, key=lambda name: name != config.table(TuningConfig).objective)
    shown = [api.Metric(name) for name in [*ordered, "seconds"]]
    with tf.summary.create_file_writer(str(folder.tensorboard)).as_default(step=0):
        api.hparams_config(hparams=parameters, metrics=shown)


def write_session(folder: SearchFolder, config: Config, record: Record, begin: float) -> None:
    """Writes a trial's line, anew where there is one.

    Args:
        folder: Of the search.
        config: Of the search.
        record: What came of the trial.
        begin: When it began or went on, in seconds since 1970.
    """
    path = folder.tensorboard / record.trial
    if path.exists():
        shutil.rmtree(path)
    shown = {_name(config, key): _shown(config, key, value) for key, value in record.values.items()}
    if config.table(TuningConfig).algorithm == "hyperband":
        shown[_EPOCHS] = record.epochs
    failed = record.status == "failed"
    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    with tf.summary.create_file_writer(str(path)).as_default(step=record.trained_epochs):
        # By both names: the page shows the searches of one folder of runs together.
        trial = f"{folder.name}-{record.trial}"
        api.hparams(shown, trial_id=trial, start_time_secs=begin)
        for name, value in record.scores.items():
            if value is not None:
                tf.summary.scalar(name, value)
        if not failed:
            tf.summary.scalar("seconds", record.seconds)
        end = summary.session_end_pb(status, end_time_secs=time.time())
        tf.summary.experimental.write_raw_pb(end.SerializeToString(), step=0)


def _domain(config: Config, key: str) -> Any:
    parameter = config.table(TuningConfig).space[key]
    values = values_of(parameter)
    if values is not None:
        return api.Discrete([_shown(config, key, value) for value in values])
    kind = (int, api.IntInterval) if is_whole(config, key) else (float, api.RealInterval)
    number, interval = kind
    return interval(number(parameter.low or 0), number(parameter.high or 0))


def _shown(config: Config, key: str, value: Any) -> Any:
    """Returns a value as the page takes it: a number if all choices are numbers, else text."""
    if _is_number(config, key):
        return float(value)
    return value if isinstance(value, str) else json.dumps(value)


def _name(config: Config, key: str) -> str:
    """Returns the column of a key. An option may be a number in one search and text in another.

    The page shows all searches together, and TensorBoard cannot sort numbers with text.
    """
    text = ".options." in key and not _is_number(config, key)
    return f"{key} (text)" if text else key


def _is_number(config: Config, key: str) -> bool:
    values = values_of(config.table(TuningConfig).space[key])
    return values is None or all(type(value) in (int, float) for value in values)
