"""The configuration of an experiment: the tables of the core, their types and defaults.

A configuration is checked and frozen. Keys that are not given have the defaults of this module.
`config_file` reads it from a TOML file.
"""

import contextlib
import copy
import functools
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from types import GenericAlias
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ValidationError, to_json, to_jsonable_python

from trainer import tools
from trainer.errors import InputError, did_you_mean

DEVICE_PATTERN = r"^(auto|cpu|gpu(:[0-9]{1,3})?|all)$"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_STRICT_OPTIONS = ConfigDict(arbitrary_types_allowed=True, **_STRICT)
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Side = Annotated[int, Field(ge=1, le=4096)]  # height or width of an image in pixels
_Folder = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Section(BaseModel):
    """A table of the TOML file: typed, frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, **_STRICT)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        known = cls.model_fields
        if isinstance(value, dict) and cls.model_config["extra"] == "forbid":
            for key in value:
                if key not in known:
                    raise ValueError(f"unknown key {key!r}: {did_you_mean(key, known)}")
        return value


SectionT = TypeVar("SectionT", bound=Section)


class KerasObject(Section):
    """A Keras object by name: `"Lion"`, or `{name = "EarlyStopping", options = {patience = 2}}`."""

    name: str
    """A Keras name, or "package.module:Name" for your own class."""
    options: dict[str, Any] = {}
    """Keyword arguments of its constructor."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ModuleSection(Section):
    """A section with the name of a module (of `data` or `models`) and options of its function."""

    name: str
    options: dict[str, Any] = {}
    """Keyword arguments of the module's load() or build()."""
    unset_options: list[str] = []
    """Options whose value is None, which TOML cannot write."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of the function."""
        return self.options | dict.fromkeys(self.unset_options)

    def resolved(self, function: Callable[..., Any]) -> Self:
        """Returns a copy whose options include the defaults of the function.

        A default that TOML cannot represent exactly is left out.
        """
        arguments = self.arguments
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            default, kind = parameter.default, parameter.annotation
            listed: Any = GenericAlias(list, Any if kind is parameter.empty else kind)
            with contextlib.suppress(ValueError):  # if there is no default, or no TOML for it
                plain = to_jsonable_python(default)
                read = None if plain is None else tomllib.loads(f"x = {_toml(plain)}")["x"]
                schema = TypeAdapter(listed, config=_STRICT_OPTIONS)
                if schema.validate_json(to_json([read])) == [default]:
                    arguments.setdefault(name, read)
        given = {name: value for name, value in arguments.items() if value is not None}
        unset = [name for name in arguments if name not in given]
        return self.model_copy(update={"options": given, "unset_options": unset})


class DataConfig(ModuleSection):
    """The data set: its source, its splits, and where its images are stored."""

    name: str = "mnist"
    """A module of trainer/data, or any image classification data set of tensorflow-datasets."""
    directory: _Folder = "data"
    """Folder for prepared data."""
    archives: _Folder | None = None
    """Folder with the original archives; default: the environment variable TRAINER_DATA_FILES."""
    allow_sample: bool = True
    """If no other source of mnist is available, use a sample of 5,000 images."""
    image_size: Annotated[tuple[_Side, _Side], Field(strict=False)] | None = None
    """[height, width] to resize to; required if the images differ in size."""
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    """How images get the aspect ratio of image_size; crop: cut the longer sides; pad: add a
    border."""
    color: Literal["auto", "grayscale", "rgb"] = "auto"
    """Convert images to this color; auto: the color of the data set."""
    background: str = Field(default="white", pattern="^(white|gray|black|#[0-9a-f]{6})$")
    """Color behind transparent pixels and beside padded images: white, gray, black or "#rrggbb"."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of train that is held out for validation."""
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of train that is held out if the data set has no test split."""
    split_seed: int = Field(default=0, ge=0, lt=2**32)
    """Random seed that selects the held-out images."""
    train_on_validation: bool = False
    """Also train on the validation images, after all settings are chosen."""
    placement: Literal["auto", "device", "stream"] = "auto"
    """device: store all images on the device; stream: copy each batch to it; auto: device up to
    device_limit_mb, else stream."""
    device_limit_mb: int = Field(default=1024, ge=0)
    """Size limit in MB (10^6 bytes) for placement = auto."""
    augmentation: list[KerasObject] = []
    """Keras layers that change training images (uint8 in, uint8 out), in order."""


class ModelConfig(ModuleSection):
    """The network."""

    name: str = "cnn"
    """A module of trainer/models."""
    freeze: list[str] = []
    """Patterns of the paths of layers that are not trained, for example "block/conv_*"."""


class OptimizerConfig(Section):
    """The optimizer and its learning rate."""

    name: str = "Adam"
    """A Keras optimizer."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Constant learning rate, or the peak of a schedule."""
    learning_rate_scaling: Literal["none", "linear", "sqrt"] = "none"
    """linear: multiply learning_rate by the number of devices; sqrt: by its square root. For a
    batch_size that was increased with the number of devices."""
    options: dict[str, Any] = {}
    """Keyword arguments of the optimizer."""
    schedule: KerasObject | None = None
    """A Keras learning rate schedule. Its option initial_learning_rate defaults to learning_rate,
    and decay_steps to the number of steps of the run, without the warm-up."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of all steps in which CosineDecay warms up from a tenth of learning_rate."""

    @model_validator(mode="after")
    def _warmup_needs_cosine(self) -> Self:
        name = self.schedule.name if self.schedule else ""
        if self.warmup_fraction and name.lower() != "cosinedecay":
            raise ValueError("warmup_fraction expects schedule.name = 'CosineDecay'")
        return self


class TrainingConfig(Section):
    """The training."""

    epochs: _Count = 3
    """Number of passes over the training images."""
    batch_size: _Count = 128
    """Images per step, over all devices."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed for initial weights, order of the images, dropout and augmentation."""
    device: str = Field(default="auto", pattern=DEVICE_PATTERN)
    """auto | cpu | gpu | gpu:N | all"""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = "auto"
    """auto: the narrowest type that the device multiplies faster than float32."""
    deterministic: bool = False
    """Use deterministic operations; an operation that has none is an error."""
    loss: KerasObject = KerasObject(name="SparseCategoricalCrossentropy")
    """A Keras loss."""
    metrics: list[KerasObject] = [
        KerasObject(name="SparseCategoricalAccuracy", options={"name": "accuracy"})
    ]
    """Keras metrics, in order."""
    callbacks: list[KerasObject] = []
    """Keras callbacks, in order."""
    class_weight: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weight of each class in the training loss, by name (others: 1), as in Keras; balanced: n /
    (classes * images of the class)."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Maximum global norm of the gradients; not set: no clipping."""
    steps_per_execution: _Count = 50
    """Steps per call of the compiled loop."""
    jit_compile: Literal["auto"] | bool = "auto"
    """Compile the step with XLA; auto: on one GPU, if Keras can compile every layer; not on a CPU,
    where XLA is slower."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Maximum seconds between checkpoints. One is also saved after each epoch."""
    cluster_timeout_seconds: float = Field(default=120.0, gt=0)
    """Maximum seconds to wait for the other workers of a cluster."""
    limit_batches: _Count | None = None
    """Use only this many batches of each split. Validation and test then use a fixed sample of all
    classes."""
    init_from: _Folder | None = None
    """Start with the weights of a finished run (directory, name or "latest") or of a .weights.h5 or
    .keras file; layers are matched by path and shape. The network loads no other weights."""
    step: str = Field(default="trainer.training.step:train_step", pattern=r"^[^:]+:[^:]+$")
    """The training step, "package.module:function"; docs/objects.md describes its arguments."""

    @field_validator("class_weight", mode="before")
    @classmethod
    def _balanced_or_table(cls, value: Any) -> Any:
        weights = value.values() if isinstance(value, dict) else []
        fits = isinstance(value, dict) or value in (None, "balanced")
        if fits and all(isinstance(weight, int | float) and weight >= 0 for weight in weights):
            return value
        raise ValueError(f"expected 'balanced' or {{ class = 2.0 }}, received {value!r}")


class LoggingConfig(Section):
    """The run directory and its contents."""

    directory: _Folder = "runs"
    """Folder for the run directories."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run; default: the names of data set and model."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    histograms: bool = False
    """Write histograms of weights and gradient norms to TensorBoard every epoch."""
    sample_images: int = Field(default=25, ge=0, le=100)
    """Number of training images in TensorBoard."""
    mistakes: int = Field(default=25, ge=0, le=100)
    """Number of most confident mistakes in TensorBoard."""
    profile: bool = False
    """Trace a few steps for TensorBoard's profiler page."""


# Old keys of each table, with their new names.
_RENAMED = {
    "training": {"steps_per_call": "steps_per_execution"},
    "data": {"files": "archives"},
}


class Config(Section):
    """The configuration of an experiment.

    It also has a table for each tool that the file configures; see `table`.
    """

    model_config = ConfigDict(extra="allow")

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    logging: LoggingConfig = LoggingConfig()

    def table(self, kind: type[SectionT]) -> SectionT:
        """Returns the table of a tool, of the class `TABLE` of its module `config`."""
        tables = (self.model_extra or {}).values()
        return next((table for table in tables if isinstance(table, kind)), kind())

    def flat(self) -> dict[str, Any]:
        """Returns the value of every key, by dotted name."""
        tables = self.model_dump()
        return {f"{t}.{key}": value for t, table in tables.items() for key, value in table.items()}

    def with_changes(self, changes: Mapping[str, Any]) -> "Config":
        """Returns a validated copy with changed keys, for example `{"training.epochs": 1}`."""
        tree = self.model_dump()
        for key, value in changes.items():
            put_value(tree, key, value)
        return parse_config(tree, origin="the changed configuration")

    def to_toml(self) -> str:
        """Returns the whole configuration as a TOML file that `load_config` reads back."""
        lines: list[str] = []
        for name, section in self.model_dump().items():
            lines += ["", f"[{name}]"]
            for key, value in section.items():
                lines.append(f"# {key} is not set" if value is None else f"{key} = {_toml(value)}")
        return "\n".join([*lines[1:], ""])


def parse_config(tree: Mapping[str, Any], *, origin: str, stored: bool = False) -> Config:
    """Checks the tables of a TOML file, and returns them as a configuration.

    Args:
        tree: The tables.
        origin: The name of the source in error messages.
        stored: An earlier version may have written them: old names of keys are accepted, and tables
            of removed tools are ignored.
    """
    known = _whole_file().model_fields
    tables = {name: copy.deepcopy(tree[name]) for name in tree if name in known or not stored}
    renamed = _RENAMED | {name: each.RENAMED for name, each in tools.config_modules().items()}
    try:
        for section, names in renamed.items():
            table: Any = tables.get(section)
            for old in names.keys() & table if isinstance(table, dict) else ():
                if not stored:
                    raise ValueError(f"{section}.{old} was renamed to {section}.{names[old]}")
                table[names[old]] = table.pop(old)
        whole = _whole_file().model_validate(tables)
        return Config.model_validate({name: getattr(whole, name) for name in tables})
    except ValueError as error:
        raise InputError(f"{origin}: {explain_invalid(error)}") from None


def put_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value of nested tables by dotted key; missing tables are created."""
    *tables, last = key.split(".")
    for name in tables:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise InputError(f"{key}: {name} is a value, not a table; received {tree!r}")
    tree[last] = value


def config_schema() -> dict[str, Any]:
    """Returns the JSON schema of a configuration file, for editors."""
    schema = _whole_file().model_json_schema()
    text = "The TOML file whose settings this file changes, relative to this file."
    schema["properties"]["extends"] = {"type": "string", "description": text}
    return schema


@functools.cache
def _whole_file() -> type[Config]:
    """Returns the class of a file: a configuration with the tables of all tools."""
    modules = tools.config_modules().items()
    tables: Any = {name: (module.TABLE, module.TABLE()) for name, module in modules}
    whole = create_model("Config", __base__=Config, __doc__=Config.__doc__, **tables)
    whole.model_config["extra"] = "forbid"
    return whole


def call_with_options(
    function: Callable[..., Any], *arguments: Any, options: Mapping[str, Any], where: str
) -> Any:
    """Calls `function(*arguments, **options)` after checking the options against its signature.

    Raises:
        InputError: An option is unknown, missing, of the wrong type or out of range. The message
            begins with `where`, the name of the table.
    """
    call: Any = functools.partial(function, *arguments)
    try:
        # As JSON: strict mode then accepts an array for a tuple, and a string for a path.
        return TypeAdapter(call, config=_STRICT_OPTIONS).validate_json(to_json(options))
    except ValidationError as error:
        known = inspect.signature(call).parameters
        raise InputError(explain_invalid(error, where, known)) from None


def explain_invalid(error: ValueError, where: str = "", options: Iterable[str] = ()) -> str:
    """Returns the key of an error of pydantic, what was expected and what was received.

    Args:
        error: Raised by pydantic, or by a check of this module.
        where: The table that was checked; "" for a whole file.
        options: The known keys of a table with the options of a function.
    """
    if not isinstance(error, ValidationError):
        return f"{where}: {error}".removeprefix(": ")
    faults = error.errors()
    fault, location = faults[0], _location(faults[0])
    if fault["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown option {location[0]!r}: {did_you_mean(location[0], options)}"
    key = ".".join(filter(None, [where, *location]))
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}".removeprefix(": ")
    if fault["type"].startswith("missing"):
        return f"{key} is missing"
    # The other types of a union; a number includes integers.
    others = [
        each for each in faults[1:] if _location(each) == location and each["loc"][-1] != "int"
    ]
    types = [_expected(each["msg"]) for each in (fault, *others)]
    return f"{key}: expected {' or '.join(types)}, received {fault['input']!r:.80}"


def _location(fault: Any) -> list[str]:
    """Returns the key of an error of pydantic, which adds each type of a union: `float | int`."""
    added = ("literal['auto']", "bool", "float", "int")
    return [str(part) for part in fault["loc"] if part not in added]


def _expected(message: str) -> str:
    """Returns what a message of pydantic expects, for example "at most 2 items"."""
    rest = r"^[A-Z]\w+ should (be |have )?| after validation, not \d+$| or instance of \w+$"
    return re.sub("^match pattern", "text that matches", re.sub(rest, "", message))


def _toml(value: Any) -> str:
    """Writes one value as TOML (a JSON string is a TOML string)."""
    if isinstance(value, dict):
        items = (f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
