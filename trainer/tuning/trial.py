"""Training of one trial, its record and its session on TensorBoard's HParams page."""

import json
import shutil
import statistics
import traceback
from collections.abc import Callable
from typing import Any

import keras

from trainer import workflow
from trainer.config import Config
from trainer.errors import CheckError, StoppedError, TrainerError
from trainer.report import write_session
from trainer.run import Run
from trainer.training.call import Logs
from trainer.tuning.config import Parameter, trial_config
from trainer.tuning.oracles import decode
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.tensorflow_internals import released_gradients

_MIN_TRIALS = 5  # the median of fewer trials is not reliable


class Pruning(keras.callbacks.Callback):
    """Ends a training whose best value is worse than the median of other trials at that epoch.

    The median stopping rule of Golovin et al. (2017), "Google Vizier". It compares best values
    instead of means, because the first epochs would dominate a mean.

    Attributes:
        pruned: Whether it has ended the training.
    """

    def __init__(self, search: SearchDirectory) -> None:
        """Takes the search, which has the objective and the curves of other trials."""
        super().__init__()
        self.pruned = False
        self._search = search
        self._choose: Callable[..., float] = max if search.tuning.direction == "max" else min
        self._values: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Compares. Pruning at the last epoch would save nothing."""
        self._values[epoch:] = [(logs or {})[self._search.tuning.objective]]
        curves = [record.curve for record in self._search.records().values()]
        others = [self._choose(curve[: epoch + 1]) for curve in curves if len(curve) > epoch]
        if len(others) < _MIN_TRIALS or epoch + 1 >= self.params["epochs"]:
            return
        best, median = self._choose(self._values), statistics.median(others)
        if self._choose(best, median) != best:
            self.pruned = self.model.stop_training = True


def run_trial(search: SearchDirectory, trial: str, chosen: dict[str, Any]) -> TrialRecord:
    """Trains a trial and returns its record. An interrupted trial continues from its checkpoint.

    Args:
        search: The search.
        trial: Number of the trial. A finished one is not trained again.
        chosen: Hyperparameters of keras-tuner.
    """
    if (done := search.records().get(trial)) is not None:
        return done
    values, count = decode(search.tuning, chosen), search.tuning.executions_per_trial
    # A promoted trial of hyperband starts again instead of continuing from earlier weights. Its
    # learning-rate schedule then covers its own epochs, and a plain `trainer fit` of best.toml
    # gives the same result. Continuing would save 12 of 94 epochs in configs/mnist_tune.toml.
    configured = values.get("training.epochs", search.config.training.epochs)
    epochs = chosen.get("tuner/epochs", configured)
    names = [trial if count == 1 else f"{trial}-{number + 1}" for number in range(count)]
    runs = [Run(search.trials / name) for name in names]
    try:
        with released_gradients():
            result = _train(search, runs, values | {"training.epochs": epochs})
    except StoppedError:
        raise
    except Exception as error:  # other trials may succeed
        text = str(error) if isinstance(error, TrainerError) else traceback.format_exc()
        result = {"status": "failed", "error": text}
    keras.utils.clear_session()
    begun = [str(run.path.relative_to(search.path)) for run in runs if run.path.is_dir()]
    record = TrialRecord(trial=trial, values=values, epochs=epochs, runs=begun, **result)
    write_trial(search, record)
    # The record is written last: a trial with a record is complete.
    search.write_record(record)
    return record


def _train(search: SearchDirectory, runs: list[Run], values: dict[str, Any]) -> dict[str, Any]:
    """Runs all executions of a trial and returns the results for its record."""
    tuning, pruning = search.tuning, Pruning(search)
    config = trial_config(search.config, values)
    # Hyperband ends trials itself: it compares short trials with each other.
    callbacks = [pruning] if tuning.pruning and tuning.algorithm != "hyperband" else []
    summaries: list[dict[str, Any]] = []
    for execution, run in enumerate(runs):
        seed = (config.training.seed + execution) % 2**31
        changed = config.with_changes({"training.seed": seed})
        summaries.append(train_or_resume(run, changed, callbacks=callbacks, score_test=False))
        if pruning.pruned:
            break
    scores: dict[str, float | None] = {}
    for name, first in summaries[0]["validation"].items():
        if not isinstance(first, list):  # a number, to be averaged over the executions
            found = [summary["validation"][name] for summary in summaries]
            scores[f"val_{name}"] = None if None in found else statistics.fmean(found)
    if scores[tuning.objective] is None:
        raise CheckError(f"{tuning.objective} is not a number")
    lines = runs[0].metrics.read_text(encoding="utf-8").splitlines()
    curve = [json.loads(line).get(tuning.objective) for line in lines]
    return {
        "status": "pruned" if pruning.pruned else "completed",
        "score": scores[tuning.objective],
        "scores": scores,
        "trained_epochs": summaries[0]["epochs"],
        "seconds": sum(summary["seconds"]["total"] for summary in summaries),
        "curve": [value for value in curve if value is not None],
    }


def train_or_resume(run: Run, config: Config, **options: Any) -> dict[str, Any]:
    """Trains a run from the beginning or from its checkpoint, and returns the summary."""
    if run.finished:
        return run.read_json("summary.json")
    if (run.path / "config.toml").exists():
        return workflow.resume(str(run.path), **options).summary
    if run.path.exists():  # killed before anything was written
        shutil.rmtree(run.path)
    return workflow.fit(config, run=run, **options).summary


def write_trial(search: SearchDirectory, record: TrialRecord) -> None:
    """Writes a trial as a row of the HParams page, and replaces an existing row."""
    path, space = search.tensorboard / record.trial, search.tuning.space
    shutil.rmtree(path, ignore_errors=True)
    if search.tuning.algorithm == "hyperband":
        space = space | {"training.epochs": Parameter(low=0, high=record.epochs)}
    tried, row = record.values | {"training.epochs": record.epochs}, {}
    for key, parameter in space.items():
        values, value = parameter.values(), tried.get(key)
        numeric = values is None or all(type(each) in (int, float) for each in values)
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            value = float(value) if numeric else text
        # The page shows all searches together and cannot sort numbers with text, but an option may
        # be a number in one search and text in another.
        row[f"{key} (text)" if ".options." in key and not numeric else key] = value
    scores: dict[str, float | None] = {search.tuning.objective: record.score, **record.scores}
    scores["seconds"] = record.seconds
    completed = record.status != "failed"
    # The name of the search is part of the ID: the page can show several searches together.
    session = f"{search.name}-{record.trial}"
    write_session(
        path, session, row, scores if completed else dict.fromkeys(scores), ended=completed
    )
