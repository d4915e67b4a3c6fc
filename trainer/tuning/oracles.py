"""keras-tuner's oracles choose the values of each trial. Here their state survives a kill.

keras-tuner 1.4.8 writes one file per trial and one for the oracle, and replaces none atomically.
Its grid forgets its position, and its Bayesian oracle repeats its favourite values.
"""

import contextlib
import io
import itertools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from trainer.errors import InputError
from trainer.files import write_text
from trainer.tuning.config import TuningConfig
from trainer.tuning.search_directory import SearchDirectory
from trainer.tuning.space import hyperparameters


class _Stored(keras_tuner.Oracle):
    """Keeps the whole state in one file that is replaced atomically.

    Attributes:
        seconds: The time of the search so far, interruptions excluded.
    """

    def __init__(self, search: SearchDirectory, **options: Any) -> None:
        super().__init__(**options)
        self.tuning = search.tuning
        self.max_trials = search.tuning.max_trials
        self.verbose = 0
        self.seconds = 0.0
        self._search = search
        # This constructor sets the directory of the oracle.
        BaseTuner(oracle=self, directory=str(search.path), project_name=search.oracle.name)

    @property
    def late(self) -> bool:
        """Whether the time of the search is used up."""
        return self.tuning.max_seconds is not None and self.seconds > self.tuning.max_seconds

    def get_state(self) -> dict[str, Any]:
        """Returns the state including all trials."""
        trials = [trial.get_state() for trial in self.trials.values()]
        state: dict[str, Any] = super().get_state()
        return state | {"trials": trials, "seconds": round(self.seconds, 1)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the state. Every trial without a record is ongoing."""
        self.trials = {each["trial_id"]: Trial.from_state(each) for each in state["trials"]}
        self.seconds = state["seconds"]
        ended = [each for each in state["end_order"] if self._search.record_file(each).exists()]
        ongoing = {each: each for each in state["start_order"] if each not in ended}
        for trial in ongoing:
            self.trials[trial].status = TrialStatus.RUNNING
        super().set_state(
            state | {"ongoing_trials": ongoing, "end_order": ended, "retry_queue": []}
        )

    def save(self) -> None:
        """Writes the state atomically."""
        write_text(self._search.oracle / "oracle.json", json.dumps(self.get_state()))

    def add_records(self) -> None:
        """Ends the ongoing trials that have a record by now."""
        for trial in list(self.ongoing_trials.values()):
            if self._search.record_file(trial.trial_id).exists():
                score = self._search.record(trial.trial_id).score
                trial.status = TrialStatus.FAILED
                if score is not None:
                    self.update_trial(trial.trial_id, {self.tuning.objective: score})
                    trial.status = TrialStatus.COMPLETED
                self.end_trial(trial)


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
    """Yields the index of each value for all points of a grid; inactive keys are missing."""
    space = tuning.in_order()
    for indices in itertools.product(*(range(len(p.values() or ())) for p in space.values())):
        point: dict[str, int] = {}
        for key, index in zip(space, indices, strict=True):
            if all(point.get(k) in allowed for k, allowed in tuning.conditions(key).items()):
                point[key] = index
            elif index:
                break  # an inactive key does not multiply the points
        else:
            yield point


_ORACLES = {
    "random": RandomSearchOracle,
    "bayesian": _Bayesian,
    "hyperband": HyperbandOracle,
    "grid": _Grid,
}


def make_oracle(search: SearchDirectory) -> Any:
    """Creates the oracle of a search and restores its state.

    Raises:
        InputError: The files of the oracle are damaged.
    """
    tuning, base = search.tuning, _ORACLES[search.tuning.algorithm]
    options: dict[str, Any] = {
        "objective": keras_tuner.Objective(tuning.objective, tuning.direction),
        "hyperparameters": hyperparameters(tuning),
        "max_consecutive_failed_trials": 10**9,  # trainer.tuning.workers counts failures
    }
    if tuning.algorithm == "hyperband":
        # One bracket follows another until max_trials.
        options |= {"max_epochs": search.config.training.epochs, "hyperband_iterations": None}
    kind: Any = type(base.__name__, (_Stored, base), {})
    try:
        state = _read_state(search)
        # keras-tuner replaces seed 0 by a random one. The restored state brings the seed of the
        # search back, except where the Gaussian process starts its optimizer: that differs for
        # each trial, but it is the same after an interruption.
        oracle = kind(search, seed=tuning.seed + 1 + len(state.get("trials", ())), **options)
        if state:
            oracle.set_state(state)
    except Exception as error:  # keras-tuner raises anything on a damaged state
        raise InputError(
            f"{search.oracle} is damaged ({type(error).__name__}: {error}): restore the files, or "
            "choose another --name"
        ) from None
    return oracle


def _read_state(search: SearchDirectory) -> dict[str, Any]:
    """Returns the content of oracle.json; nothing for a new search."""
    file = search.oracle / "oracle.json"
    if not file.exists():
        return {}
    state: dict[str, Any] = json.loads(file.read_bytes())
    if "trials" not in state:  # the first version wrote a file for each trial
        files = [search.oracle / f"trial_{each}" / "trial.json" for each in state["start_order"]]
        state |= {"trials": [json.loads(each.read_bytes()) for each in files], "seconds": 0.0}
        for seconds in search.path.glob("seconds.json"):
            state |= json.loads(seconds.read_bytes())
    return state


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what keras-tuner prints for debugging, and its warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
