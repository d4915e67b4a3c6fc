"""keras-tuner's oracles choose the values of each trial. Here their state survives a kill.

keras-tuner 1.4.8 writes one file per trial and one for the oracle, and replaces none atomically.
Its grid forgets its position, and its Bayesian oracle repeats its favorite values.

It supports numbers and strings. A choice here can be any TOML value, for example a list of layer
sizes, so keras-tuner receives its index. Values of a range with a step are indices, too.
"""

import contextlib
import io
import itertools
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras_tuner
from keras_tuner.engine.base_tuner import BaseTuner
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from trainer import keras_objects
from trainer.errors import InputError
from trainer.files import write_text
from trainer.tuning.config import TuningConfig
from trainer.tuning.search_directory import SearchDirectory

_DIGITS = 6  # significant digits of a sampled value: best.toml shows exactly what was tried


class _Bayesian(BayesianOptimizationOracle):
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
        following = itertools.islice(self._combinations(), len(self.start_order), None)
        values = next(following, None)
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
    "bayesian": _Bayesian,
    "hyperband": HyperbandOracle,
    "grid": _Grid,
}


@contextlib.contextmanager
def restored_oracle(search: SearchDirectory) -> Iterator[Any]:
    """Locks the search, restores its oracle with the results of all processes, and saves it."""
    with (
        search.lock,
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),  # keras-tuner prints for debugging
        tempfile.TemporaryDirectory() as folder,  # for its own files, which are not used
    ):
        try:
            oracle = _restore(search, folder)
        except Exception as error:  # keras-tuner raises anything on a damaged state
            damage = f"{search.path} is damaged: {keras_objects.explain(error)}"
            raise InputError(f"{damage}; choose another --name") from None
        yield oracle
        trials = [trial.get_state() for trial in oracle.trials.values()]
        write_text(search.oracle, json.dumps(oracle.get_state() | {"trials": trials}))


def _restore(search: SearchDirectory, folder: str) -> Any:
    """Creates an oracle, sets its state, and ends the trials that have a record by now."""
    tuning, records = search.tuning, search.records()
    new = not search.oracle.exists() and not records
    state: dict[str, Any] = {"trials": []}
    state = state if new else json.loads(search.oracle.read_bytes())
    options: dict[str, Any] = {
        "objective": keras_tuner.Objective(tuning.objective, tuning.direction),
        "hyperparameters": _hyperparameters(tuning),
        "max_consecutive_failed_trials": 10**9,  # trainer.tuning.search counts failures
        # keras-tuner replaces seed 0 by a random one. The restored state brings the seed of the
        # search back, except where the Gaussian process starts its optimizer: that differs for
        # each trial, but it is the same after an interruption.
        "seed": tuning.seed + 1 + len(state["trials"]),
    }
    if tuning.algorithm == "hyperband":  # one bracket follows another until max_trials
        options |= {"max_epochs": search.config.training.epochs, "hyperband_iterations": None}
    oracle: Any = _ORACLES[tuning.algorithm](**options)
    oracle.max_trials, oracle.verbose = tuning.max_trials, 0
    BaseTuner(oracle=oracle, directory=folder)  # sets the directory of the oracle
    if new:
        return oracle
    oracle.trials = {each["trial_id"]: Trial.from_state(each) for each in state["trials"]}
    ongoing = {each: each for each in state["start_order"] if each not in state["end_order"]}
    oracle.set_state(state | {"ongoing_trials": ongoing})
    for trial in [each for each in oracle.ongoing_trials.values() if each.trial_id in records]:
        score = records[trial.trial_id].score
        if score is not None:
            oracle.update_trial(trial.trial_id, {tuning.objective: score})
        trial.status = TrialStatus.FAILED if score is None else TrialStatus.COMPLETED
        oracle.end_trial(trial)
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
                whole = isinstance(parameter.low, int) and isinstance(parameter.high, int)
                add = space.Int if whole else space.Float
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
        elif isinstance(chosen[key], int):
            found[key] = chosen[key]
        else:
            rounded = float(f"{chosen[key]:.{_DIGITS}g}")
            found[key] = min(max(rounded, float(parameter.low or 0)), float(parameter.high or 0))
    return found
