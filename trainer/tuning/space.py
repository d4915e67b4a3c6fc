"""The search space: keys of the configuration as hyperparameters of keras-tuner, and back.

keras-tuner supports numbers and strings. A choice here can be any TOML value, for example a list
of layer sizes, so keras-tuner receives its index. Values of a range with a step are indices, too.
Nothing here imports TensorFlow at module level: an invalid space is refused within a second.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from trainer.config import Config
from trainer.errors import InputError
from trainer.tuning.config import Parameter, TuningConfig

if TYPE_CHECKING:
    import keras_tuner

_log = logging.getLogger(__name__)

# Trials are compared by the same metrics on the same images, so these keys cannot be searched.
# The best of several seeds would be luck: tuning.executions_per_trial averages over seeds instead.
_FIXED = (
    *("data", "logging", "tuning"),
    *("training.limit_batches", "training.metrics", "training.seed"),
)
_FREE = ("data.augmentation", "data.image_size")  # of `data`, but the images stay the same
# How the names of metrics end.
_DIRECTIONS = {
    "max": ("acc", "accuracy", "auc", "precision", "recall", "f1_score"),
    "min": ("loss", "error", "divergence", "crossentropy", "mse", "mae", "mape", "msle"),
}
_DIGITS = 6  # significant digits of a sampled value: best.toml shows exactly what was tried


def check_space(config: Config) -> None:
    """Checks that the configuration accepts every end and choice of the space.

    Raises:
        InputError: The space is empty, or a key or value of it cannot be used.
    """
    tuning, epochs = config.table(TuningConfig), config.training.epochs
    if not tuning.space:
        raise InputError(
            "tuning.space is empty: expected keys to search over, for example "
            '"optimizer.learning_rate" = { low = 0.001, high = 0.1, scale = "log" }'
        )
    for key, parameter in tuning.space.items():
        if _within(key, _FIXED) and not _within(key, _FREE):
            raise InputError(f"tuning.space: {key} must be the same for all trials of a search")
        if _within(key, ("training.loss",)) and tuning.objective == "val_loss":
            raise InputError(
                f"tuning.space: {key} changes the meaning of val_loss: set another tuning.objective"
            )
        if tuning.algorithm == "grid" and parameter.values() is None:
            raise InputError(f"tuning.space.{key}: a grid expects choices, or a range with a step")
    if config.data.train_on_validation:
        raise InputError(
            "data.train_on_validation: expected false, because the validation images select the "
            "best trial (`--refit` then trains it on them, too); received true"
        )
    if tuning.algorithm == "hyperband" and ("training.epochs" in tuning.space or epochs < 3):
        raise InputError(
            "hyperband itself chooses the epochs of each trial: expected 3 or more in "
            f"training.epochs and none in tuning.space, received training.epochs = {epochs}"
        )
    for _ in extremes(config):
        pass


def _within(key: str, tables: tuple[str, ...]) -> bool:
    return any(key == table or key.startswith(f"{table}.") for table in tables)


def extremes(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields a name and a configuration for each end and each choice of the space.

    Raises:
        InputError: The configuration refuses one.
    """
    space = config.table(TuningConfig).space
    for key, parameter in space.items():
        for value in parameter.values() or [parameter.low, parameter.high]:
            try:
                changed = trial_config(config, _conditions(space, key) | {key: value})
            except InputError as error:
                reason = str(error).removeprefix("the changed configuration: ")
                raise InputError(f"tuning.space.{key}: {reason}") from None
            yield f"{key} = {value!r}", changed


def _conditions(space: Mapping[str, Parameter], key: str) -> dict[str, Any]:
    """Returns values of other keys that satisfy the conditions of a key."""
    found: dict[str, Any] = {}
    for other, values in space[key].when.items():
        found |= _conditions(space, other) | {other: values[0]}
    return found


def searched(config: Config) -> dict[str, Parameter]:
    """Returns the space. With hyperband it includes the epochs, which hyperband chooses."""
    tuning = config.table(TuningConfig)
    if tuning.algorithm != "hyperband":
        return tuning.space
    return {**tuning.space, "training.epochs": Parameter(low=1, high=config.training.epochs)}


def hyperparameters(tuning: TuningConfig) -> "keras_tuner.HyperParameters":
    """Returns the space as an object of keras-tuner."""
    import keras_tuner

    space = keras_tuner.HyperParameters()
    for key, parameter in tuning.in_order().items():
        with ExitStack() as scopes:
            for condition in tuning.conditions(key).items():
                scopes.enter_context(space.conditional_scope(*condition))
            values = parameter.values()
            if values is not None:
                space.Choice(key, list(range(len(values))))
            else:
                add = space.Int if parameter.whole else space.Float
                add(key, parameter.low, parameter.high, sampling=parameter.scale)
    return space


def decode(tuning: TuningConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a trial by dotted key of the configuration.

    Args:
        tuning: Has the space.
        chosen: Hyperparameters that keras-tuner chose. Inactive ones are missing.
    """
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


def direction_of(tuning: TuningConfig) -> str:
    """Returns "min" or "max".

    Raises:
        InputError: The direction is "auto", and the name of the objective does not show it.
    """
    objective, direction = tuning.objective, tuning.direction
    known = next((each for each, ends in _DIRECTIONS.items() if objective.endswith(ends)), None)
    if direction == "auto" and known is None:
        raise InputError(
            f"tuning.objective = {objective!r}: is a higher or a lower value better? Set "
            "tuning.direction to 'max' or 'min'"
        )
    if direction != "auto" and known not in (None, direction):
        _log.warning("tuning.direction = %r searches for the worst %s.", direction, objective)
    return known if direction == "auto" and known else direction


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Returns a column title for each key: its last word, or the whole key if that is not clear."""
    last = {key: key.rpartition(".")[2] for key in keys}
    words = ["name", *last.values()]
    return {key: word if words.count(word) == 1 else key for key, word in last.items()}


def trial_config(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the configuration of a trial, without the tables of tools.

    Args:
        config: The configuration of the search.
        values: By dotted key. Another name of optimizer or model drops the options of the
            configured one, as `--set` does.

    Raises:
        InputError: The configuration refuses a value.
    """
    tuning = config.table(TuningConfig)
    core = Config.model_validate(config.model_dump(include=set(Config.model_fields)))
    changes: dict[str, Any] = {}
    for section in ("model", "optimizer"):
        name = getattr(config, section).name
        if values.get(f"{section}.name", name) != name:
            changes[f"{section}.options"] = {}
    changed = core.with_changes(changes | dict(values))
    callbacks = [callback.model_dump() for callback in changed.training.callbacks]
    if not tuning.patience or "earlystopping" in [each["name"].lower() for each in callbacks]:
        return changed
    options = {"monitor": tuning.objective, "mode": tuning.direction, "patience": tuning.patience}
    options["restore_best_weights"] = True  # the trial is scored by its best weights
    stopping = {"name": "EarlyStopping", "options": options}
    return changed.with_changes({"training.callbacks": [*callbacks, stopping]})
