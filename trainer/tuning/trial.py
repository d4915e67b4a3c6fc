"""One trial: a configuration that goes through the same training as every other."""

import contextlib
import json
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from tensorflow.python.framework import ops

from trainer import workflow
from trainer.config import Config
from trainer.errors import CheckError, StoppedError, TrainerError
from trainer.run import Run
from trainer.training.loop import Logs
from trainer.tuning import hparams
from trainer.tuning.config import TuningConfig
from trainer.tuning.folder import Record, SearchFolder
from trainer.tuning.oracles import COMPLETED, FAILED, IDLE, STOPPED, quiet
from trainer.tuning.space import decode, trial_config

# Before so many others have come as far, their median says little.
_ENOUGH_OTHERS = 5
_IDLE_SECONDS = 0.5


class Pruning(keras.callbacks.Callback):
    """Ends a training whose best so far is worse than the median of the others' at that epoch.

    The median stopping rule of Golovin et al. (2017), "Google Vizier", with the best value in place
    of the mean, which the first epochs would weigh down.
    """

    def __init__(self, folder: SearchFolder, objective: str, direction: str, mark: Path) -> None:
        """Prepares.

        Args:
            folder: Remembers the curves of the others.
            objective: The metric.
            direction: "max" or "min".
            mark: A file that says that the training was ended, to whoever finds it finished.
        """
        super().__init__()
        self._folder = folder
        self._objective = objective
        self._direction = direction
        self._mark = mark
        self.best: float | None = None

    @property
    def pruned(self) -> bool:
        """Whether the training was ended, by this process or by one that was killed after it."""
        return self._mark.exists()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Compares; the last epoch has nothing left to save."""
        choose = max if self._direction == "max" else min
        value = (logs or {})[self._objective]
        self.best = value if self.best is None else choose(self.best, value)
        curves = [record.curve for record in self._folder.records()]
        others = [choose(curve[: epoch + 1]) for curve in curves if len(curve) > epoch]
        if len(others) < _ENOUGH_OTHERS or epoch + 1 >= self.params["epochs"]:
            return
        median = statistics.median(others)
        if choose(self.best, median) != self.best:
            self._mark.touch()
            self.model.stop_training = True


def run_trials(
    folder: SearchFolder,
    config: Config,
    oracle: keras_tuner.Oracle,
    worker: str,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Does what the oracle gives, until it has no more.

    Args:
        folder: Of the search.
        config: Of the search.
        oracle: One of this process, or of the chief.
        worker: By whose name the oracle knows us.
        after: Called after each trial.

    Raises:
        StoppedError: A signal came; the state is saved.
    """
    while True:
        with quiet():
            trial = oracle.create_trial(worker)
        if trial.status == STOPPED:
            return
        if trial.status == IDLE:  # others are at what the next depends on
            time.sleep(_IDLE_SECONDS)
            continue
        record = run_trial(folder, config, trial.trial_id, trial.hyperparameters.values)
        with quiet():
            if record.score is not None:
                oracle.update_trial(
                    trial.trial_id, {config.table(TuningConfig).objective: record.score}
                )
            trial.status = COMPLETED if record.score is not None else FAILED
            oracle.end_trial(trial)
        after()


def run_trial(folder: SearchFolder, config: Config, trial: str, chosen: dict[str, Any]) -> Record:
    """Trains what keras-tuner chose; a trial that was interrupted goes on from its checkpoint.

    Args:
        folder: Of the search.
        config: Of the search.
        trial: Its number.
        chosen: Its hyperparameters.

    Returns:
        What came of it; of a trial that is done already, what came of it then.

    Raises:
        StoppedError: A signal came; the state is saved.
    """
    done = folder.record(trial)
    if done is not None:
        return done
    values = decode(config, chosen)
    # A promoted trial of hyperband trains anew, not on from the weights of the earlier one: its
    # learning-rate schedule goes over its own epochs, and so its result is that of a plain
    # `trainer fit` of its configuration. Going on would have saved 12 of the 94 epochs of the
    # search in configs/mnist_tune.toml.
    epochs = chosen.get("tuner/epochs")
    unfinished = Record(
        trial, "failed", None, {}, values, epochs or config.training.epochs, 0, 0.0, [], []
    )
    begin = time.time()
    try:
        with _freed():
            record = _train(folder, config, unfinished, epochs)
    except StoppedError:
        raise
    except TrainerError as error:
        record = replace(unfinished, error=str(error), runs=_runs_of(folder, trial))
    except Exception:  # whatever it is: the others may do better
        error_text = traceback.format_exc()
        record = replace(unfinished, error=error_text, runs=_runs_of(folder, trial))
    # The record comes last: what has one is done, and its session is written.
    hparams.write_session(folder, config, record, begin)
    folder.write_record(record)
    return record


@contextlib.contextmanager
def _freed() -> Iterator[None]:
    """Frees the memory of the trainings within when they are over.

    Whatever a graph takes gradients of by tf.custom_gradient, TensorFlow registers for good, and
    with it the graph and what it has captured: all images, once a trial.
    """
    registered = ops.gradient_registry._registry
    before = set(registered)
    try:
        yield
    finally:
        for name in registered.keys() - before:
            if name.startswith("CustomGradient"):
                del registered[name]
        keras.utils.clear_session()


def _train(folder: SearchFolder, config: Config, record: Record, epochs: int | None) -> Record:
    tuning = config.table(TuningConfig)
    own = trial_config(config, record.values, epochs)
    summaries: list[dict[str, Any]] = []
    pruned = False
    for execution in range(tuning.executions_per_trial):
        name = (
            record.trial if tuning.executions_per_trial == 1 else f"{record.trial}-{execution + 1}"
        )
        run = Run(folder.trials / name)
        pruning = Pruning(folder, tuning.objective, tuning.direction, run.path / "pruned")
        seed = (own.training.seed + execution) % 2**31
        summaries.append(_execute(run, own.with_changes({"training.seed": seed}), pruning, config))
        pruned = pruning.pruned
        if pruned:
            break
    scores = _means([summary["validation"] for summary in summaries])
    score = scores[tuning.objective]
    if score is None:
        raise CheckError(f"{tuning.objective} is no number")
    runs = _runs_of(folder, record.trial)
    return replace(
        record,
        status="pruned" if pruned else "completed",
        score=score,
        scores=scores,
        epochs=own.training.epochs,
        trained_epochs=summaries[0]["epochs"],
        seconds=sum(summary["seconds"]["total"] for summary in summaries),
        curve=_curve(folder.path / runs[0], tuning.objective),
        runs=runs,
    )


def _execute(run: Run, config: Config, pruning: Pruning, search: Config) -> dict[str, Any]:
    """Trains once, from the beginning or from where it was interrupted; returns the summary."""
    # Hyperband prunes by itself: its trials of few epochs are to be compared with each other.
    prunes = (
        search.table(TuningConfig).pruning and search.table(TuningConfig).algorithm != "hyperband"
    )
    callbacks = [pruning] if prunes else []
    if run.finished:
        return run.read_json("summary.json")
    (run.path / "pruned").unlink(missing_ok=True)  # it goes on from before that
    if (run.path / "config.toml").exists():
        fitted = workflow.resume(str(run.path), callbacks=callbacks, score_test=False)
    else:
        if run.path.exists():  # killed before there was anything in it
            shutil.rmtree(run.path)
        fitted = workflow.fit(config, callbacks=callbacks, run=run, score_test=False)
    return fitted.summary


def _means(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each metric that is one number, named as in validation."""
    means: dict[str, float | None] = {}
    for name, first in scores[0].items():
        values = [each[name] for each in scores]
        if not isinstance(first, list):
            means[f"val_{name}"] = None if None in values else statistics.fmean(values)
    return means


def _runs_of(folder: SearchFolder, trial: str) -> list[str]:
    paths = [folder.trials / trial, *sorted(folder.trials.glob(f"{trial}-*"))]
    return [str(path.relative_to(folder.path)) for path in paths if path.is_dir()]


def _curve(run: Path, objective: str) -> list[float]:
    lines = Run(run).metrics.read_text(encoding="utf-8").splitlines()
    values = [json.loads(line).get(objective) for line in lines]
    return [value for value in values if value is not None]
