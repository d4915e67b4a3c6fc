"""keras-tuner's oracles, which choose what to try next, made to survive being killed.

As they are (1.4.8), they write their files in place, so that a kill leaves half a file; they list a
trial that has ended among those under way, and would do it again; they forget one that was drawn
but not yet listed; a grid does not remember where it was; and the Bayesian one tries its favourite
again and again.
"""

import contextlib
import io
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from keras_tuner.engine.metrics_tracking import infer_metric_direction
from keras_tuner.engine.trial import Trial
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from trainer.config import Config
from trainer.errors import InputError
from trainer.files import write_text
from trainer.tuning.config import TuningConfig
from trainer.tuning.space import hyperparameters

_log = logging.getLogger(__name__)

RUNNING, COMPLETED, FAILED = "RUNNING", "COMPLETED", "FAILED"
STOPPED, IDLE = "STOPPED", "IDLE"


class _Durable(keras_tuner.Oracle):
    """What all of them need: files written whole, and a state that can be gone on from."""

    def save(self) -> None:
        """Writes oracle.json, whole or not at all."""
        write_text(Path(self._get_oracle_fname()), json.dumps(self.get_state()))

    def _save_trial(self, trial: Trial) -> None:
        path = Path(self._get_trial_dir(trial.trial_id)) / "trial.json"
        write_text(path, json.dumps(trial.get_state()))

    def get_state(self) -> dict[str, Any]:
        """Returns the state; a trial that has ended is not under way."""
        state: dict[str, Any] = super().get_state()
        state["ongoing_trials"] = {
            worker: trial.trial_id
            for worker, trial in self.ongoing_trials.items()
            if trial.status == RUNNING
        }
        return state

    def reload(self) -> None:
        """Reads the state; a trial of which only its own file knows was never begun.

        Raises:
            FileNotFoundError: A trial that was begun has no file.
        """
        super().reload()
        lost = sorted(set(self.start_order) - self.trials.keys())
        if lost:
            raise FileNotFoundError(f"no trial.json of trial {', '.join(lost)}")
        for trial_id in self.trials.keys() - set(self.start_order):
            del self.trials[trial_id]
            shutil.rmtree(self._get_trial_dir(trial_id))


class _Random(_Durable, RandomSearchOracle):
    pass


class _Bayesian(_Durable, BayesianOptimizationOracle):
    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Returns the most promising values; where they were tried before, others at random."""
        response: dict[str, Any] = super().populate_space(trial_id)
        if response["status"] == RUNNING and self._duplicate(response["values"]):
            response = self._random_populate_space()
        return response


class _Hyperband(_Durable, HyperbandOracle):
    pass


class Grid(_Durable):
    """Every combination in turn: the n-th trial is the n-th, whatever was interrupted between."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:  # noqa: ARG002
        """Returns the next combination."""
        following = itertools.islice(self.combinations(), len(self.start_order), None)
        values = next(following, None)
        if values is None:
            return {"status": STOPPED}
        return {"status": RUNNING, "values": values}

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Gives all of them, without the parameters that a condition rules out."""
        yield from _combinations(self.hyperparameters.space, {})


def _combinations(space: list[Any], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if not space:
        yield dict(values)
        return
    first, *rest = space
    if not all(condition.is_active(values) for condition in first.conditions):
        yield from _combinations(rest, values)
        return
    for value in first.values:
        yield from _combinations(rest, {**values, first.name: value})


def direction_of(config: Config) -> str:
    """Returns "min" or "max".

    Raises:
        InputError: Keras does not know a metric of the objective's name.
    """
    tuning = config.table(TuningConfig)
    found = _inferred_direction(tuning.objective)
    if tuning.direction != "auto":
        if found not in (None, tuning.direction):
            _log.warning(
                "tuning.direction = %r: the worst %s is looked for.",
                *(tuning.direction, tuning.objective),
            )
        return tuning.direction
    if found is None:
        raise InputError(
            f"tuning.objective = {tuning.objective!r}: is more or less of it better? Set "
            "tuning.direction to 'max' or 'min'"
        )
    return found


def _inferred_direction(objective: str) -> str | None:
    """Returns the direction by which Keras's metric of this name is meant; None if not known."""
    try:
        found: str | None = infer_metric_direction(objective)
    except (TypeError, ValueError, AttributeError):  # of metrics that need arguments
        return None
    # keras-tuner answers "min" for every metric that it has not listed, F1Score among them.
    return found if found == "max" or _is_loss(objective.removeprefix("val_")) else None


def _is_loss(name: str) -> bool:
    try:
        return name == "loss" or keras.losses.get(name) is not None
    except (TypeError, ValueError):
        return False


def make_oracle(config: Config, folder: Path) -> keras_tuner.Oracle:
    """Makes the oracle that a configuration names; what it chose before is read from its folder.

    Args:
        config: Of the search, its direction resolved.
        folder: Keeps the oracle's files.

    Raises:
        InputError: They are damaged.
    """
    tuning = config.table(TuningConfig)
    options: dict[str, Any] = {
        "objective": keras_tuner.Objective(tuning.objective, tuning.direction),
        "hyperparameters": hyperparameters(config),
        "seed": tuning.seed + 1,  # keras-tuner takes 0 for "any"
        "max_consecutive_failed_trials": 10**9,  # the search itself counts them
    }
    if tuning.algorithm == "hyperband":
        # Brackets after brackets, until the trials are used up.
        oracle = _Hyperband(max_epochs=config.training.epochs, hyperband_iterations=None, **options)
        oracle.max_trials = tuning.max_trials
    else:
        kinds = {"random": _Random, "bayesian": _Bayesian, "grid": Grid}
        oracle = kinds[tuning.algorithm](max_trials=tuning.max_trials, **options)
    oracle.verbose = 0
    oracle._set_project_dir(str(folder.parent), folder.name)
    if (folder / "oracle.json").exists():
        try:
            oracle.reload()
        except Exception as error:  # whatever keras-tuner makes of half a file
            raise InputError(
                f"{folder} is damaged ({type(error).__name__}: {error}): put back what was there, "
                "or choose another --name"
            ) from None
    return oracle


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what keras-tuner prints to find its own faults, and what it warns of, to itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
