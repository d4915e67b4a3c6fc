"""The search space: what it may contain, and the configuration of a trial.

Nothing here imports TensorFlow: an invalid space is refused within a second.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config import Config
from trainer.errors import InputError, expect
from trainer.tuning.config import TuningConfig

# Trials are compared by the same metrics on the same images, so these keys cannot be searched.
# The best of several seeds would be luck: tuning.executions_per_trial averages over seeds instead.
_FIXED = (
    *("data.", "logging.", "tuning."),
    *("training.limit_batches.", "training.metrics.", "training.seed."),
)
_FREE = ("data.augmentation.", "data.image_size.")  # the images stay the same
# How the names of metrics end.
_DIRECTIONS = {
    "max": ("acc", "accuracy", "auc", "precision", "recall", "f1_score"),
    "min": ("loss", "error", "divergence", "crossentropy", "mse", "mae", "mape", "msle"),
}


def check_space(config: Config) -> None:
    """Checks that the configuration accepts every end and choice of the space.

    Raises:
        InputError: The space is empty, or a key or value of it cannot be used.
    """
    tuning, epochs = config.table(TuningConfig), config.training.epochs
    example = '"optimizer.learning_rate" = { low = 0.001, high = 0.1, scale = "log" }'
    expect(tuning.space, "tuning.space is empty", f"keys to search over, as {example}", "none")
    fixed = (*_FIXED, "training.loss.") if tuning.objective == "val_loss" else _FIXED
    for key, parameter in tuning.space.items():
        if f"{key}.".startswith(fixed) and not f"{key}.".startswith(_FREE):
            raise InputError(
                f"tuning.space: {key} must be the same for all trials of a search that compares "
                f"their {tuning.objective}"
            )
        if tuning.algorithm == "grid" and parameter.values() is None:
            raise InputError(f"tuning.space.{key}: a grid expects choices, or a range with a step")
    expect(
        not config.data.train_on_validation,
        "data.train_on_validation",
        "false, because the validation images select the best trial (`--refit` trains it on them)",
        "true",
    )
    expect(
        tuning.algorithm != "hyperband" or (epochs >= 3 and "training.epochs" not in tuning.space),
        "hyperband itself chooses the epochs of each trial",
        "3 or more in training.epochs and none in tuning.space",
        f"training.epochs = {epochs}",
    )
    for _ in extremes(config):
        pass


def extremes(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields a name and a configuration for each end and each choice of the space.

    Raises:
        InputError: The configuration refuses one.
    """
    for key, parameter in config.table(TuningConfig).space.items():
        conditions = {other: values[0] for other, values in parameter.when.items()}
        for value in parameter.values() or [parameter.low, parameter.high]:
            try:
                changed = trial_config(config, conditions | {key: value})
            except InputError as error:
                reason = str(error).removeprefix("the changed configuration: ")
                raise InputError(f"tuning.space.{key}: {reason}") from None
            yield f"{key} = {value!r}", changed


def direction_of(tuning: TuningConfig) -> str:
    """Returns "min" or "max".

    Raises:
        InputError: The direction is "auto", and the name of the objective does not show it.
    """
    if tuning.direction != "auto":
        return tuning.direction
    for direction, endings in _DIRECTIONS.items():
        if tuning.objective.endswith(endings):
            return direction
    raise InputError(
        f"tuning.objective = {tuning.objective!r}: is a higher or a lower value better? Set "
        "tuning.direction to 'max' or 'min'"
    )


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
