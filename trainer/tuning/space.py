"""The space of a search: keys of the configuration, and hyperparameters of keras-tuner.

keras-tuner's choices are single numbers or words of one type. Here a choice may be anything that
TOML can say (a list of layer sizes), so keras-tuner is given its place in the list; so are the
values of a range with a step. Nothing here imports TensorFlow: a faulty space is refused within a
second.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trainer.config import Config
from trainer.errors import InputError
from trainer.tuning.config import Parameter, TuningConfig

if TYPE_CHECKING:
    import keras_tuner

# Trials are compared by the same scores of the same images, and the search names their directories.
# No seed is better than another: the best of several is luck (tuning.executions_per_trial).
_FIXED = (
    "data",
    "logging",
    "tuning",
    "training.limit_batches",
    "training.metrics",
    "training.seed",
)
_FREE = ("data.augmentation", "data.image_size")  # the same images all the same
# Digits of a value drawn from a range: what is tried is what a person reads in best.toml.
_DIGITS = 6


def check_space(config: Config) -> None:
    """Refuses a space that is empty or whose ends and choices the configuration does not take.

    Raises:
        InputError: With one line that names the key.
    """
    tuning = config.table(TuningConfig)
    if not tuning.space:
        raise InputError(
            "tuning.space is empty: expected keys to search over, for example "
            '"optimizer.learning_rate" = { low = 0.001, high = 0.1, scale = "log" }'
        )
    for key, parameter in tuning.space.items():
        if _within(key, _FIXED) and not _within(key, _FREE):
            raise InputError(f"tuning.space: {key} is the same for all trials of a search")
        if _within(key, ("training.loss",)) and tuning.objective == "val_loss":
            raise InputError(
                f"tuning.space: {key} changes what val_loss is: expected another tuning.objective"
            )
        if tuning.algorithm == "grid" and values_of(parameter) is None:
            raise InputError(f"tuning.space.{key}: a grid expects choices, or a range with a step")
    if config.data.train_on_validation:
        raise InputError(
            "data.train_on_validation: expected false, since the validation images choose the best "
            "(`--refit` trains it on them, too); received true"
        )
    if tuning.algorithm == "hyperband":
        _check_hyperband(config)
    for _ in extremes(config):
        pass


def _within(key: str, tables: tuple[str, ...]) -> bool:
    return any(key == table or key.startswith(f"{table}.") for table in tables)


def _check_hyperband(config: Config) -> None:
    if "training.epochs" in config.table(TuningConfig).space:
        raise InputError("tuning.space: training.epochs is what hyperband itself chooses")
    if config.training.epochs < 3:
        raise InputError(
            "hyperband trains most trials for a third of training.epochs and less: expected 3 or "
            f"more, received {config.training.epochs}"
        )


def extremes(config: Config) -> Iterator[tuple[str, Config]]:
    """Gives a configuration for each end and choice of the space, and what is special about it.

    Raises:
        InputError: The configuration does not take one.
    """
    space = config.table(TuningConfig).space
    for key, parameter in space.items():
        values = values_of(parameter) or [parameter.low, parameter.high]
        for value in values:
            try:
                changed = trial_config(config, _conditions(space, key) | {key: value})
            except InputError as error:
                reason = str(error).removeprefix("the changed configuration: ")
                raise InputError(f"tuning.space.{key}: {reason}") from None
            yield f"{key} = {value!r}", changed


def _conditions(space: Mapping[str, Parameter], key: str) -> dict[str, Any]:
    """Returns values of other keys under which a key is set."""
    found: dict[str, Any] = {}
    for other, values in space[key].when.items():
        found |= _conditions(space, other) | {other: values[0]}
    return found


def values_of(parameter: Parameter) -> list[Any] | None:
    """Returns every value a parameter can have; None: a range without a step."""
    if parameter.choices is not None:
        return parameter.choices
    if parameter.step is None or parameter.low is None or parameter.high is None:
        return None
    values: list[Any] = [parameter.low]
    while values[-1] < parameter.high * (1 - 1e-9) - 1e-12:
        last = values[-1]
        following = last * parameter.step if parameter.scale == "log" else last + parameter.step
        # Without the noise of adding up: 0.1 + 0.2 is 0.3 to a person.
        values.append(following if isinstance(following, int) else float(f"{following:.12g}"))
    return values


def hyperparameters(config: Config) -> "keras_tuner.HyperParameters":
    """Returns the space as keras-tuner takes it."""
    import keras_tuner
    from keras_tuner.engine.hyperparameters import Choice, Float, Int
    from keras_tuner.src.engine.conditions import Parent

    space = keras_tuner.HyperParameters()
    for key, parameter in config.table(TuningConfig).in_order().items():
        conditions = [
            Parent(
                other,
                [(config.table(TuningConfig).space[other].choices or []).index(v) for v in values],
            )
            for other, values in parameter.when.items()
        ]
        values = values_of(parameter)
        if values is not None:
            made = Choice(key, list(range(len(values))), conditions=conditions)
        else:
            kind = Int if is_whole(config, key) else Float
            made = kind(
                *(key, parameter.low, parameter.high),
                sampling=parameter.scale,
                conditions=conditions,
            )
        space.merge([made])
    return space


def is_whole(config: Config, key: str) -> bool:
    """Says whether a range is of whole numbers: both ends are, and the key is not of fractions."""
    parameter = config.table(TuningConfig).space[key]
    if not (isinstance(parameter.low, int) and isinstance(parameter.high, int)):
        return False
    tree: Any = config.with_changes(
        _conditions(config.table(TuningConfig).space, key) | {key: parameter.low}
    ).model_dump()
    for name in key.split("."):
        tree = tree[name]
    return isinstance(tree, int)


def decode(config: Config, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of the configuration's keys that keras-tuner chose.

    Args:
        config: Its space was given to keras-tuner.
        chosen: A trial's hyperparameters by name; those that no condition rules out.
    """
    found: dict[str, Any] = {}
    for key, parameter in config.table(TuningConfig).in_order().items():
        if key not in chosen:
            continue
        values = values_of(parameter)
        if values is not None:
            found[key] = values[int(chosen[key])]
        elif is_whole(config, key):
            found[key] = int(chosen[key])
        else:
            rounded = float(f"{chosen[key]:.{_DIGITS}g}")
            found[key] = min(max(rounded, float(parameter.low or 0)), float(parameter.high or 0))
    return found


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Returns what a table calls each key: as little of its end as tells it from the others."""
    keys = list(keys)
    found = {}
    for key in keys:
        parts = key.split(".")
        fewest = 2 if parts[-1] == "name" else 1
        ends = [".".join(parts[-count:]) for count in range(fewest, len(parts) + 1)]
        unique = (e for e in ends if not any(k != key and f".{k}".endswith(f".{e}") for k in keys))
        found[key] = next(unique, key)
    return found


def trial_config(config: Config, values: Mapping[str, Any], epochs: int | None = None) -> Config:
    """Returns the configuration of a trial, which knows nothing of the search.

    Args:
        config: Of the search.
        values: By dotted key. Another name of optimizer, network or data leaves the options of the
            former behind, as under `--set`.
        epochs: What hyperband chose; None: as the configuration says.

    Raises:
        InputError: The configuration does not take a value.
    """
    changes: dict[str, Any] = {"tuning": {}}
    for section in ("model", "optimizer"):
        name = values.get(f"{section}.name")
        if name is not None and name != getattr(config, section).name:
            changes[f"{section}.options"] = {}
    changes |= values
    if epochs is not None:
        changes["training.epochs"] = epochs
    changed = config.with_changes(changes)
    stopping = _early_stopping(config)
    names = {callback.name.lower() for callback in changed.training.callbacks}
    if stopping is None or "earlystopping" in names:
        return changed
    callbacks = [callback.model_dump() for callback in changed.training.callbacks]
    return changed.with_changes({"training.callbacks": [*callbacks, stopping]})


def _early_stopping(config: Config) -> dict[str, Any] | None:
    tuning = config.table(TuningConfig)
    if not tuning.patience:
        return None
    options = {
        "monitor": tuning.objective,
        "mode": tuning.direction,
        "patience": tuning.patience,
        "restore_best_weights": True,  # those that the trial is judged by
    }
    return {"name": "EarlyStopping", "options": options}
