"""keras-tuner's oracles choose the values of each trial. Here they survive a kill at any moment.

keras-tuner 1.4.8 writes one file per trial and one for the oracle, and replaces none atomically. A
kill can leave half a file, a trial that the oracle does not know, or a finished trial that would
run again. Its grid forgets its position, and its Bayesian oracle repeats its favourite values.
"""

import contextlib
import io
import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.metrics_tracking import infer_metric_direction
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from trainer.errors import InputError
from trainer.files import write_text
from trainer.tuning.config import TuningConfig
from trainer.tuning.search_directory import SearchDirectory
from trainer.tuning.space import hyperparameters

_log = logging.getLogger(__name__)


class _Durable(keras_tuner.Oracle):
    """Keeps the whole state in one file that is replaced atomically; limits the search time."""

    def __init__(self, search: SearchDirectory, **options: Any) -> None:
        super().__init__(**options)
        self.tuning = search.tuning
        self.max_trials = search.tuning.max_trials
        self.verbose = 0
        self._search = search
        self._file = search.oracle / "oracle.json"
        self._start = time.monotonic()
        # This constructor sets the directory of the oracle.
        BaseTuner(oracle=self, directory=str(search.path), project_name=search.oracle.name)

    @property
    def seconds(self) -> float:
        """The time of the search so far, interruptions excluded."""
        return time.monotonic() - self._start

    @property
    def late(self) -> bool:
        """Whether the time of the search is used up."""
        return self.tuning.max_seconds is not None and self.seconds > self.tuning.max_seconds

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Returns the values of the next trial; none if the time is used up."""
        if self.late and self.trials:
            return {"status": TrialStatus.STOPPED}
        response: dict[str, Any] = super().populate_space(trial_id)
        return response

    def get_state(self) -> dict[str, Any]:
        """Returns the state including all trials."""
        trials = [trial.get_state() for trial in self.trials.values()]
        state: dict[str, Any] = super().get_state()
        return state | {"trials": trials, "seconds": round(self.seconds, 1)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the state. Trials that did not end or have no record are handed out again."""
        order, ended = state["start_order"], state["end_order"]
        if "trials" not in state:  # the format of trainer 1: a file for each trial
            files = [self._search.oracle / f"trial_{trial}" / "trial.json" for trial in order]
            state = state | {"trials": [_read(file) for file in files], "seconds": 0.0}
            for file in self._search.path.glob("seconds.json"):
                state |= _read(file)
        self.trials = {each["trial_id"]: Trial.from_state(each) for each in state["trials"]}
        self._start = time.monotonic() - state["seconds"]
        ended = [trial for trial in ended if self._search.record_file(trial).exists()]
        queue = [trial for trial in reversed(order) if trial not in ended]
        changes = {"ongoing_trials": {}, "retry_queue": queue, "end_order": ended}
        super().set_state(state | changes)

    def save(self) -> None:
        """Writes the state atomically."""
        write_text(self._file, json.dumps(self.get_state()))

    def reload(self) -> None:
        """Reads the state, if there is one.

        Raises:
            InputError: The file is damaged.
        """
        try:
            if self._file.exists():
                self.set_state(_read(self._file))
        except Exception as error:  # keras-tuner raises anything on a damaged state
            raise InputError(
                f"{self._search.oracle} is damaged ({type(error).__name__}: {error}): restore the "
                "files, or choose another --name"
            ) from None


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


class _Bayesian(BayesianOptimizationOracle, RandomSearchOracle):
    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Returns the most promising values; random ones if these were tried before."""
        response: dict[str, Any] = super().populate_space(trial_id)
        tried = [trial.hyperparameters.values for trial in self.trials.values()]
        if response.get("values") in tried:
            response = RandomSearchOracle.populate_space(self, trial_id)
        return response


class _Grid(keras_tuner.Oracle):
    """Every combination in order. Trial n is combination n, whatever was interrupted before."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:  # noqa: ARG002
        """Returns the next combination."""
        following = itertools.islice(combinations(self.tuning), len(self.start_order), None)
        values = next(following, None)
        return {"status": TrialStatus.RUNNING if values else TrialStatus.STOPPED, "values": values}


def combinations(tuning: TuningConfig) -> Iterator[dict[str, int]]:
    """Yields the index of each parameter's value for every point of a grid.

    A parameter whose conditions do not hold is missing.
    """

    def extend(keys: list[str], point: dict[str, int]) -> Iterator[dict[str, int]]:
        if not keys:
            yield point
            return
        key, *rest = keys
        active = all(point.get(o) in allowed for o, allowed in tuning.conditions(key).items())
        indices = range(len(tuning.space[key].values() or ()))
        for extended in [{**point, key: index} for index in indices] if active else [point]:
            yield from extend(rest, extended)

    return extend(list(tuning.in_order()), {})


def direction_of(tuning: TuningConfig) -> str:
    """Returns "min" or "max".

    Raises:
        InputError: The direction is "auto", and Keras has no metric with the objective's name.
    """
    objective, direction = tuning.objective, tuning.direction
    known = _infer_direction(objective)
    if direction == "auto":
        if known is None:
            raise InputError(
                f"tuning.objective = {objective!r}: is a higher or a lower value better? Set "
                "tuning.direction to 'max' or 'min'"
            )
        return known
    if known not in (None, direction):
        _log.warning("tuning.direction = %r searches for the worst %s.", direction, objective)
    return direction


def _infer_direction(objective: str) -> str | None:
    """Returns the direction of Keras's metric or loss of this name; None if there is none."""
    try:
        direction: str | None = infer_metric_direction(objective)
        if direction == "min" and objective != "val_loss":
            # keras-tuner returns "min" for all metrics it does not list, for example F1Score.
            keras.losses.get(objective.removeprefix("val_"))
    except (TypeError, ValueError, AttributeError):  # no loss, or a metric that needs arguments
        return None
    return direction


def make_oracle(search: SearchDirectory) -> Any:
    """Creates the oracle of a search and restores its state.

    Raises:
        InputError: The files of the oracle are damaged.
    """
    tuning = search.tuning
    options: dict[str, Any] = {
        "objective": keras_tuner.Objective(tuning.objective, tuning.direction),
        "hyperparameters": hyperparameters(tuning),
        "seed": tuning.seed + 1,  # keras-tuner replaces 0 by a random seed
        "max_consecutive_failed_trials": 10**9,  # trainer.tuning.search counts failures
    }
    if tuning.algorithm == "hyperband":
        # One bracket follows another until max_trials.
        options |= {"max_epochs": search.config.training.epochs, "hyperband_iterations": None}
    kinds = {"random": RandomSearchOracle, "bayesian": _Bayesian, "grid": _Grid}
    base = kinds.get(tuning.algorithm, HyperbandOracle)
    oracle: Any = type(base.__name__, (_Durable, base), {})(search, **options)
    oracle.reload()
    return oracle


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what keras-tuner prints for debugging, and its warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
