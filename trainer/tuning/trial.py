"""Training of one trial."""

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
from trainer.run import Run
from trainer.tensorflow_internals import released_gradients
from trainer.training.call import Logs
from trainer.tuning.hparams import write_session
from trainer.tuning.oracles import decode
from trainer.tuning.search_directory import SearchDirectory, TrialRecord
from trainer.tuning.space import trial_config

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
        self._values.append((logs or {})[self._search.tuning.objective])
        curves = [record.curve for record in self._search.records().values()]
        others = [self._choose(curve[: epoch + 1]) for curve in curves if len(curve) > epoch]
        if len(others) < _MIN_TRIALS or epoch + 1 >= self.params["epochs"]:
            return
        best, median = self._choose(self._values), statistics.median(others)
        if self._choose(best, median) != best:
            self.pruned = self.model.stop_training = True


def run_trial(search: SearchDirectory, trial: str, chosen: dict[str, Any]) -> TrialRecord:
    """Trains one trial. An interrupted trial continues from its checkpoint.

    Args:
        search: The search.
        trial: Number of the trial.
        chosen: Hyperparameters of keras-tuner.

    Returns:
        The record. A finished trial is not trained again: its record is read.

    Raises:
        StoppedError: A signal stopped the training; the state is saved.
    """
    if (done := search.records().get(trial)) is not None:
        return done
    values = decode(search.tuning, chosen)
    # A promoted trial of hyperband starts again instead of continuing from earlier weights. Its
    # learning-rate schedule then covers its own epochs, and a plain `trainer fit` of best.toml
    # gives the same result. Continuing would save 12 of 94 epochs in configs/mnist_tune.toml.
    configured = values.get("training.epochs", search.config.training.epochs)
    epochs = chosen.get("tuner/epochs", configured)
    try:
        with released_gradients():
            record = _train(search, trial, values, epochs)
    except StoppedError:
        raise
    except Exception as error:  # other trials may succeed
        text = str(error) if isinstance(error, TrainerError) else traceback.format_exc()
        runs = _runs_of(search, trial)
        record = TrialRecord(
            trial=trial, status="failed", values=values, epochs=epochs, error=text, runs=runs
        )
    keras.utils.clear_session()
    write_session(search, record)
    # The record is written last: a trial with a record is complete.
    search.write_record(record)
    return record


def _train(search: SearchDirectory, trial: str, values: dict[str, Any], epochs: int) -> TrialRecord:
    """Runs all executions of a trial and returns its record."""
    tuning, count = search.tuning, search.tuning.executions_per_trial
    config = trial_config(search.config, {"training.epochs": epochs} | values)
    summaries: list[dict[str, Any]] = []
    pruning = Pruning(search)
    for execution in range(count):
        run = Run(search.trials / (trial if count == 1 else f"{trial}-{execution + 1}"))
        seed = (config.training.seed + execution) % 2**31
        changed = config.with_changes({"training.seed": seed})
        pruning = Pruning(search)
        # Hyperband ends trials itself: it compares short trials with each other.
        callbacks = [pruning] if tuning.pruning and tuning.algorithm != "hyperband" else []
        summaries.append(train_or_resume(run, changed, callbacks=callbacks, score_test=False))
        if pruning.pruned:
            break
    scores = _mean_scores([summary["validation"] for summary in summaries])
    if scores[tuning.objective] is None:
        raise CheckError(f"{tuning.objective} is not a number")
    runs = _runs_of(search, trial)
    lines = Run(search.path / runs[0]).metrics.read_text(encoding="utf-8").splitlines()
    curve = [json.loads(line).get(tuning.objective) for line in lines]
    return TrialRecord(
        trial=trial,
        status="pruned" if pruning.pruned else "completed",
        score=scores[tuning.objective],
        scores=scores,
        values=values,
        epochs=config.training.epochs,
        trained_epochs=summaries[0]["epochs"],
        seconds=sum(summary["seconds"]["total"] for summary in summaries),
        curve=[value for value in curve if value is not None],
        runs=runs,
    )


def train_or_resume(run: Run, config: Config, **options: Any) -> dict[str, Any]:
    """Trains a run from the beginning or from its checkpoint, and returns the summary."""
    if run.finished:
        return run.read_json("summary.json")
    if (run.path / "config.toml").exists():
        return workflow.resume(str(run.path), **options).summary
    if run.path.exists():  # killed before anything was written
        shutil.rmtree(run.path)
    return workflow.fit(config, run=run, **options).summary


def _mean_scores(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each scalar metric over the executions, with the prefix "val_"."""
    means: dict[str, float | None] = {}
    for name, first in scores[0].items():
        values = [each[name] for each in scores]
        if not isinstance(first, list):
            means[f"val_{name}"] = None if None in values else statistics.fmean(values)
    return means


def _runs_of(search: SearchDirectory, trial: str) -> list[str]:
    """Returns the run directories of a trial, relative to the search."""
    paths = [search.trials / trial, *sorted(search.trials.glob(f"{trial}-*"))]
    return [str(path.relative_to(search.path)) for path in paths if path.is_dir()]
