"""keras-tuner's oracles choose the values of each trial. Here their state survives a kill.

keras-tuner 1.4.8 writes one file per trial and one for the oracle, and replaces none atomically.
Its grid forgets its position, and its Bayesian oracle repeats its favourite values.

It supports numbers and strings. A choice here can be any TOML value, for example a list of layer
sizes, so keras-tuner receives its index. Values of a range with a step are indices, too.
"""

import contextlib
import io
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from trainer.errors import InputError
from trainer.files import write_text
from trainer.tuning.config import TuningConfig
from trainer.tuning.search_directory import SearchDirectory

_DIGITS = 6  # significant digits of a sampled value: best.toml shows exactly what was tried


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
        BaseTuner(oracle=self, directory=str(search.path), project_name="oracle")

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
        """Restores the state, and ends the trials that have a record by now."""
        self.trials = {each["trial_id"]: Trial.from_state(each) for each in state["trials"]}
        self.seconds = state["seconds"]
        ongoing = {each: each for each in state["start_order"] if each not in state["end_order"]}
        super().set_state(state | {"ongoing_trials": ongoing})
        records = self._search.records()
        for trial in list(self.ongoing_trials.values()):
            if trial.trial_id in records:
                score = records[trial.trial_id].score
                trial.status = TrialStatus.FAILED
                if score is not None:
                    self.update_trial(trial.trial_id, {self.tuning.objective: score})
                    trial.status = TrialStatus.COMPLETED
                self.end_trial(trial)

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Returns the next values; random ones where the Bayesian oracle repeats itself."""
        response: dict[str, Any] = super().populate_space(trial_id)
        tried = [trial.hyperparameters.values for trial in self.trials.values()]
        if response.get("values") in tried:
            response = RandomSearchOracle.populate_space(self, trial_id)
        return response

    def save(self) -> None:
        """Writes the state atomically."""
        write_text(self._search.oracle, json.dumps(self.get_state()))


class _Grid(keras_tuner.Oracle):
    """Every combination in order. Trial n is combination n, whatever was interrupted before."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:  # noqa: ARG002
        """Returns the next combination."""
        values = next(itertools.islice(self._combinations(), len(self.start_order), None), None)
        return {"status": TrialStatus.RUNNING if values else TrialStatus.STOPPED, "values": values}

    def _combinations(self) -> Iterator[dict[str, int]]:
        space = self.get_space()
        names = [choice.name for choice in space.space]
        for indices in itertools.product(*(choice.values for choice in space.space)):
            space.values = dict(zip(names, indices, strict=True))
            inactive = {choice.name for choice in space.space if not space.is_active(choice)}
            if not any(space.values[name] for name in inactive):  # once without these keys
                yield {name: space.values[name] for name in names if name not in inactive}


_ORACLES = {
    "random": RandomSearchOracle,
    "bayesian": BayesianOptimizationOracle,
    "hyperband": HyperbandOracle,
    "grid": _Grid,
}


def make_oracle(search: SearchDirectory) -> Any:
    """Creates the oracle of a search, with the results of all processes. The search is locked.

    Raises:
        InputError: The state of the oracle is damaged.
    """
    tuning, base = search.tuning, _ORACLES[search.tuning.algorithm]
    options: dict[str, Any] = {
        "objective": keras_tuner.Objective(tuning.objective, tuning.direction),
        "hyperparameters": _hyperparameters(tuning),
        "max_consecutive_failed_trials": 10**9,  # trainer.tuning.workers counts failures
    }
    if tuning.algorithm == "hyperband":
        # One bracket follows another until max_trials.
        options |= {"max_epochs": search.config.training.epochs, "hyperband_iterations": None}
    kind: Any = type(base.__name__, (_Stored, base), {})
    try:
        new = not search.oracle.exists() and not search.records()
        state = {} if new else json.loads(search.oracle.read_bytes())
        # keras-tuner replaces seed 0 by a random one. The restored state brings the seed of the
        # search back, except where the Gaussian process starts its optimizer: that differs for
        # each trial, but it is the same after an interruption.
        oracle = kind(search, seed=tuning.seed + 1 + len(state.get("trials", ())), **options)
        if not new:
            oracle.set_state(state)
    except Exception as error:  # keras-tuner raises anything on a damaged state
        raise InputError(
            f"{search.oracle} is damaged ({type(error).__name__}: {error}): restore the files, or "
            "choose another --name"
        ) from None
    return oracle


def _hyperparameters(tuning: TuningConfig) -> keras_tuner.HyperParameters:
    """Returns the space as an object of keras-tuner."""
    space = keras_tuner.HyperParameters()
    for key, parameter in tuning.in_order().items():
        with contextlib.ExitStack() as scopes:
            for other, values in parameter.when.items():
                choices = tuning.space[other].choices or []
                indices = [choices.index(value) for value in values]
                scopes.enter_context(space.conditional_scope(other, indices))
            if (possible := parameter.values()) is not None:
                space.Choice(key, list(range(len(possible))))
            else:
                add = space.Int if parameter.whole else space.Float
                add(key, parameter.low, parameter.high, sampling=parameter.scale)
    return space


def decode(tuning: TuningConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that keras-tuner chose, by dotted key; inactive keys are missing."""
    found: dict[str, Any] = {}
    for key, parameter in tuning.in_order().items():
        if key not in chosen:
            continue
        values = parameter.values()
        if values is not None:
            found[key] = values[int(chosen[key])]
        elif parameter.whole:
            found[key] = int(chosen[key])
        else:
            rounded = float(f"{chosen[key]:.{_DIGITS}g}")
            found[key] = min(max(rounded, float(parameter.low or 0)), float(parameter.high or 0))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what keras-tuner prints for debugging, and its warnings."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield
