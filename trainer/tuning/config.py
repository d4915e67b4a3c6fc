"""The table [tuning] of a configuration."""

import math
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainer.config import Section
from trainer.errors import did_you_mean

_MOST_STEPS = 10_000  # of a range with a step: more is a range without

# Old keys of the table, and their new names.
RENAMED = {
    "trials": "max_trials",
    "seconds": "max_seconds",
    "executions": "executions_per_trial",
}


class Parameter(Section):
    """What a search may set one key of the configuration to: a range, or one of some values."""

    low: float | int | None = Field(default=None, description="Least value of a range")
    high: float | int | None = Field(
        default=None, description="Greatest value; whole numbers only where both ends are whole"
    )
    step: float | int | None = Field(
        default=None, gt=0, description="From a value to the next; what to multiply by under log"
    )
    scale: Literal["linear", "log"] = Field(
        default="linear", description="log: values are drawn by their order of magnitude"
    )
    choices: list[Any] | None = Field(default=None, description="Values, in place of a range")
    when: dict[str, list[Any]] = Field(
        default={},
        description="Other keys of the space, and the choices of theirs under which this is set",
    )

    @model_validator(mode="after")
    def _range_or_choices(self) -> Self:
        ends = [end for end in (self.low, self.high) if end is not None]
        if self.choices is not None:
            if ends or self.step is not None or self.scale != "linear":
                raise ValueError("expected either choices or low and high, received both")
            if not self.choices or any(c in self.choices[:i] for i, c in enumerate(self.choices)):
                raise ValueError(f"choices: expected different values, received {self.choices}")
            return self
        if len(ends) < 2 or ends[0] >= ends[1]:
            raise ValueError(
                f"expected low < high, or choices; received low = {self.low}, high = {self.high}"
            )
        if self.scale == "log" and ends[0] <= 0:
            raise ValueError(f"scale = 'log' expects low > 0, received {ends[0]}")
        if self.step is not None:
            self._check_step(ends[0], ends[1], self.step)
        return self

    def _check_step(self, low: float, high: float, step: float) -> None:
        if self.scale == "log":
            if step <= 1:
                raise ValueError(f"scale = 'log' expects step > 1, received {step}")
            count = math.log(high / low, step)
        else:
            count = (high - low) / step
        if abs(count - round(count)) > 1e-6 or count > _MOST_STEPS:
            raise ValueError(
                f"step = {step} expected to lead from low = {low} to high = {high} in whole steps "
                f"({_MOST_STEPS} at most), received {count:.6g} steps"
            )


class TuningConfig(Section):
    """How `trainer tune` searches, and where."""

    algorithm: Literal["random", "bayesian", "hyperband", "grid"] = Field(
        default="random", description="hyperband trains many for few epochs, few for all of them"
    )
    objective: str = Field(
        default="val_accuracy", description="val_loss, or val_ and the name of a metric"
    )
    direction: Literal["auto", "min", "max"] = Field(
        default="auto", description="auto: as Keras's metric of that name is meant"
    )
    max_trials: int = Field(default=30, ge=1, lt=10**6, description="The most to try")
    max_seconds: float | None = Field(
        default=None, gt=0, description="Begin no trial after so long, interruptions not counted"
    )
    executions_per_trial: int = Field(
        default=1, ge=1, le=100, description="Trainings a trial, of different seeds; their mean"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of the values to try")
    patience: int = Field(
        default=3,
        ge=0,
        description="Epochs without a better objective that end a training; 0: none",
    )
    pruning: bool = Field(
        default=True,
        description="End a trial that is worse than the median of the others after as many epochs",
    )
    keep: int = Field(default=3, ge=1, description="How many of the best keep their weights")
    stop_on_failure: bool = Field(
        default=False, description="End the search with the first trial that fails"
    )
    space: dict[str, Parameter] = Field(
        default={}, description="What to try: a range or choices by the dotted key they are for"
    )

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Takes optimizer.learning_rate = {...} for "optimizer.learning_rate" = {...}."""
        return dict(_flat(value)) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _conditions_hold(self) -> Self:
        for key, parameter in self.space.items():
            for other, values in parameter.when.items():
                known = self.space.get(other)
                if known is None or known.choices is None:
                    named = [k for k, p in self.space.items() if p.choices is not None and k != key]
                    raise ValueError(
                        f"space.{key}.when: expected keys of the space that have choices, "
                        f"received {other!r}: {did_you_mean(other, named)}"
                    )
                strange = [v for v in values if v not in known.choices]
                if strange or not values:
                    raise ValueError(
                        f"space.{key}.when.{other}: expected some of {known.choices}, "
                        f"received {values}"
                    )
            inner = [other for other in self.space if other.startswith(f"{key}.")]
            if inner:
                raise ValueError(f"space: {key!r} and {inner[0]!r} set the same: expected one")
        self.in_order()
        return self

    def in_order(self) -> dict[str, Parameter]:
        """Returns the space, each key after those that its conditions name."""
        ordered: dict[str, Parameter] = {}
        while len(ordered) < len(self.space):
            ready = {
                key: parameter
                for key, parameter in self.space.items()
                if key not in ordered and parameter.when.keys() <= ordered.keys()
            }
            if not ready:
                circle = ", ".join(key for key in self.space if key not in ordered)
                raise ValueError(f"space: {circle} wait for each other in their conditions")
            ordered |= ready
        return ordered


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Gives the tables of a space by their dotted keys, however TOML has nested them."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and not value.keys() & Parameter.model_fields.keys():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


TABLE = TuningConfig
