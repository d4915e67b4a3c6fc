"""The table [tuning] of a configuration: the search space, and how `trainer tune` searches it.

Nothing here imports TensorFlow: an invalid space is refused within a second.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainer.config import Config, Section
from trainer.errors import InputError, MissingError, did_you_mean, expect

# Keys of earlier versions: refused in files, translated in stored configurations.
RENAMED = {"trials": "max_trials", "executions": "executions_per_trial", "seconds": "max_seconds"}
_MAX_VALUES = 10_000  # of a range with a step
# Trials are compared by the same metrics on the same images, so these keys cannot be searched.
# The best of several seeds would be luck: tuning.executions_per_trial averages over seeds instead.
_FIXED = ("data.", "logging.", "tuning.", "training.limit_", "training.metrics.", "training.seed.")
_FREE = ("data.augmentation.", "data.image_size.")  # the images stay the same
# How the names of metrics end.
_DIRECTIONS = {
    "max": ("acc", "accuracy", "auc", "precision", "recall", "f1_score"),
    "min": ("loss", "error", "divergence", "crossentropy", "mse", "mae", "mape", "msle"),
}


class Parameter(Section):
    """The values of one key: a range of numbers, or choices."""

    low: float | int | None = None
    """Smallest value of a range."""
    high: float | int | None = None
    """Largest value; if both ends are whole, all values are."""
    step: float | int | None = Field(default=None, gt=0)
    """Difference between neighbors; with log: their ratio."""
    scale: Literal["linear", "log"] = "linear"
    """log: sample the logarithm uniformly."""
    choices: list[Any] | None = None
    """Values, instead of a range."""
    when: dict[str, list[Any]] = Field(default={})
    """Set this key only if other keys, which have no `when`, have one of these choices."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> Self:
        low, high, step = self.low, self.high, self.step
        if self.choices is not None:
            if (low, high, step, self.scale) != (None, None, None, "linear"):
                raise ValueError("expected either choices or low and high, received both")
            if not self.choices or any(c in self.choices[:i] for i, c in enumerate(self.choices)):
                raise ValueError(f"choices: expected different values, received {self.choices}")
            return self
        if low is None or high is None or low >= high:
            raise ValueError(
                f"expected low < high, or choices; received low = {low}, high = {high}"
            )
        if self.scale == "log" and (low <= 0 or (step or math.inf) <= 1):
            raise ValueError(
                f"scale = 'log' expects low > 0 and step > 1, received low = {low}, step = {step}"
            )
        if len(self.values() or ()) == _MAX_VALUES:
            raise ValueError(f"step = {step}: expected fewer than {_MAX_VALUES} values")
        return self

    def values(self) -> list[Any] | None:
        """Returns all possible values; None for a range without a step."""
        low, high, step = self.low, self.high, self.step
        if low is None or high is None or step is None:
            return self.choices
        log, steps = self.scale == "log", range(_MAX_VALUES)
        numbers = (low * step**i if log else low + i * step for i in steps)
        # Without rounding errors: 0.1 + 2 * 0.1 becomes 0.3.
        rounded = (each if isinstance(each, int) else float(f"{each:.12g}") for each in numbers)
        return list(itertools.takewhile(lambda value: value <= high, rounded))


class TuningConfig(Section):
    """How `trainer tune` searches."""

    algorithm: Literal["random", "bayesian", "hyperband", "grid"] = "random"
    """hyperband: many short trials, few full-length ones."""
    objective: str = "val_accuracy"
    """val_loss, or val_ and a metric."""
    direction: Literal["auto", "min", "max"] = "auto"
    """auto: derived from the name of the objective."""
    max_trials: int = Field(default=30, ge=1, lt=10**6)
    """Maximum number of trials."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Start no trial after this time, counted from the start of the command."""
    executions_per_trial: int = Field(default=1, ge=1, le=100)
    """Trainings per trial with different seeds; averaged."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed of the search."""
    patience: int = Field(default=3, ge=0)
    """Epochs without improvement before a training ends; 0: no end."""
    pruning: bool = True
    """End a trial below the median of the others at the same epoch."""
    keep: int = Field(default=3, ge=1)
    """Number of best trials that keep their weights."""
    stop_on_failure: bool = False
    """End the search if a trial fails."""
    space: dict[str, Parameter] = Field(default={})
    """The search space: a range or choices for each dotted key."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Accepts optimizer.learning_rate = {...} for "optimizer.learning_rate" = {...}."""
        return dict(_flatten(value)) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_space(self) -> Self:
        usable = {key: p.choices for key, p in self.space.items() if p.choices and not p.when}
        for key, parameter in self.space.items():
            for other, values in parameter.when.items():
                if other not in usable:
                    raise ValueError(
                        f"space.{key}.when: expected keys of the space that have choices and no "
                        f"`when`, received {other!r}: {did_you_mean(other, usable)}"
                    )
                if not values or any(value not in usable[other] for value in values):
                    raise ValueError(
                        f"space.{key}.when.{other}: expected some of {usable[other]}, "
                        f"received {values}"
                    )
            inner = [other for other in self.space if other.startswith(f"{key}.")]
            if inner:
                raise ValueError(f"space: {key!r} and {inner[0]!r} set the same: expected one")
        return self

    def in_order(self) -> dict[str, Parameter]:
        """Returns the space, each key after the keys that its conditions name."""
        return dict(sorted(self.space.items(), key=lambda item: bool(item[1].when)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the parameters of a space by dotted key, whatever nesting the TOML file uses."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and not value.keys() & Parameter.model_fields.keys():
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


TABLE = TuningConfig


def check_space(config: Config) -> None:
    """Refuses a space that is empty, or that the configuration or the algorithm cannot use."""
    tuning = config.table(TuningConfig)
    example = '"optimizer.learning_rate" = { low = 0.001, high = 0.1, scale = "log" }'
    expect(tuning.space, "tuning.space is empty", f"keys to search over, as {example}", "none")
    if config.data.train_on_validation:
        reason = "the validation images select the best trial"
        raise InputError(f"data.train_on_validation: expected false, because {reason}")
    fixed = [*_FIXED]
    fixed += ["training.loss."] if tuning.objective == "val_loss" else []
    fixed += ["training.epochs."] if tuning.algorithm == "hyperband" else []  # it chooses them
    for key, parameter in tuning.space.items():
        if f"{key}.".startswith(tuple(fixed)) and not f"{key}.".startswith(_FREE):
            raise InputError(
                f"tuning.space: {key} must be the same for all trials of a search by "
                f"{tuning.algorithm} for {tuning.objective}"
            )
        if tuning.algorithm == "grid" and parameter.values() is None:
            raise InputError(f"tuning.space.{key}: a grid expects choices, or a range with a step")
    check_extremes(config, lambda _: None)


def check_extremes(config: Config, build: Callable[[Config], Any]) -> None:
    """Calls a function with a configuration for each end and each choice of the space.

    An error of the configuration or of the function names the value.
    """
    for key, parameter in config.table(TuningConfig).space.items():
        conditions = {other: values[0] for other, values in parameter.when.items()}
        for value in parameter.values() or [parameter.low, parameter.high]:
            try:
                build(trial_config(config, conditions | {key: value}))
            except (InputError, MissingError) as error:
                reason = str(error).removeprefix("the changed configuration: ")
                raise type(error)(f"tuning.space.{key} = {value!r}: {reason}") from None


def direction_of(tuning: TuningConfig) -> str:
    """Returns "min" or "max"; the name of the objective must show it if the key is "auto"."""
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
    """Returns the configuration of a trial from its values by dotted key, without tools' tables.

    Another name of optimizer or model drops the options of the configured one, as `--set` does.
    """
    tuning = config.table(TuningConfig)
    core = Config.model_validate(config.model_dump(include=set(Config.model_fields)))
    changes: dict[str, Any] = {}
    for section in ("model", "optimizer"):
        name = getattr(config, section).name
        if values.get(f"{section}.name", name) != name:
            changes[f"{section}.options"] = {}
    changed = core.with_changes(changes | dict(values))
    callbacks = changed.training.callbacks
    if not tuning.patience or "earlystopping" in [each.name.lower() for each in callbacks]:
        return changed
    options = {"monitor": tuning.objective, "mode": tuning.direction, "patience": tuning.patience}
    options["restore_best_weights"] = True  # the trial is scored by its best weights
    stopping = {"name": "EarlyStopping", "options": options}
    return changed.with_changes({"training.callbacks": [*callbacks, stopping]})
