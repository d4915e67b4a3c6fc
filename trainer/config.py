"""The configuration of an experiment: the tables of the core, their types and defaults.

A configuration is read from a TOML file, changed by `--set section.key=value`, checked and frozen.
Keys that are missing in the file have the defaults of this module.
"""

import contextlib
import copy
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import to_json, to_jsonable_python
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from trainer import tools
from trainer.errors import InputError, did_you_mean

DEVICE_PATTERN = r"^(auto|cpu|gpu(:[0-9]{1,3})?|all)$"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Side = Annotated[int, Field(ge=1, le=4096)]  # height or width of an image in pixels
# TOML has no tuples: an array is accepted, its items are checked strictly.
ImageSize = Annotated[tuple[_Side, _Side], Field(strict=False)]
# A path must not be empty or contain a null byte.
_Folder = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Section(BaseModel):
    """A table of the TOML file: typed, frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, **_STRICT)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        if isinstance(value, dict) and cls.model_config["extra"] == "forbid":
            _require_known(value, cls.model_fields)
        return value


SectionT = TypeVar("SectionT", bound=Section)


def _require_known(keys: Iterable[str], known: Iterable[str], kind: str = "key") -> None:
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ValueError(f"unknown {kind} {unknown[0]!r}: {did_you_mean(unknown[0], known)}")


class KerasObject(Section):
    """A Keras object by name: `"Lion"`, or `{name = "EarlyStopping", options = {patience = 2}}`."""

    name: str
    """A Keras name, or "package.module:Name" for your own class."""
    options: dict[str, Any] = {}
    """Keyword arguments of its constructor."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, dict | KerasObject):
            raise ValueError(f"expected a name or {{ name, options }}, received {_short(value)}")
        return value


class ModuleSection(Section):
    """A section with the name of a module (of `data` or `models`) and options of its function."""

    name: str
    options: dict[str, Any] = {}
    unset_options: list[str] = []
    """Options whose value is None, which TOML cannot write."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of the function."""
        return self.options | dict.fromkeys(self.unset_options)

    def resolved(self, function: Callable[..., Any]) -> Self:
        """Returns a copy whose options include the defaults of the function.

        A default that TOML cannot represent exactly is left out.

        Args:
            function: Called with one positional argument and the options.
        """
        arguments = self.arguments
        schema = _OptionSchema(function, 1)
        for name, default in schema.defaults.items():
            if name not in arguments:
                with contextlib.suppress(ValueError):
                    plain = to_jsonable_python(default)
                    if plain is not None:
                        plain = tomllib.loads(f"value = {_toml(plain)}")["value"]
                    if schema.check(arguments | {name: plain})[name] == default:
                        arguments[name] = plain
        given = {name: value for name, value in arguments.items() if value is not None}
        unset = [name for name in arguments if name not in given]
        return self.model_copy(update={"options": given, "unset_options": unset})


class _OptionSchema:
    """The options of a function: its parameters, with their annotations and defaults."""

    def __init__(self, function: Callable[..., Any], positional: int) -> None:
        """Reads the signature.

        Args:
            function: Takes the options as keyword arguments.
            positional: Number of leading parameters that are not options.
        """
        parameters = [*inspect.signature(function, eval_str=True).parameters.values()][positional:]
        self._open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.defaults = {p.name: p.default for p in named if p.default is not p.empty}
        hints = {p.name: Any if p.annotation is p.empty else p.annotation for p in named}
        self._hints = {n: NotRequired[h] if n in self.defaults else h for n, h in hints.items()}

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options with the types of the parameters.

        Raises:
            ValueError: An option is unknown, missing, of the wrong type or out of range.
        """
        if not self._open:
            _require_known(options, self._hints, "option")
        make: Any = TypedDict
        schema = make("Options", self._hints)
        extra = "allow" if self._open else "forbid"
        schema.__pydantic_config__ = _STRICT | {"arbitrary_types_allowed": True, "extra": extra}
        # As JSON: strict mode then accepts an array for a tuple, and a string for a path.
        checked: dict[str, Any] = TypeAdapter(schema).validate_json(to_json(options))
        return checked


class DataConfig(ModuleSection):
    """The data set: its source, its splits, and where its images are stored."""

    name: str = "mnist"
    """A module of trainer/data, or any image classification data set of tensorflow-datasets."""
    options: dict[str, Any] = {}
    """Keyword arguments of load() of a module of trainer/data."""
    directory: _Folder = "data"
    """Folder for prepared data."""
    archives: _Folder | None = None
    """Folder with the original archives; default: the environment variable TRAINER_DATA_FILES."""
    allow_sample: bool = True
    """If no other source of mnist is available, use a sample of 5,000 images."""
    image_size: ImageSize | None = None
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
    options: dict[str, Any] = {}
    """Keyword arguments of its build()."""


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
        name = self.schedule.name if self.schedule else None
        if self.warmup_fraction and (name or "").lower() != "cosinedecay":
            raise ValueError(
                "warmup_fraction expects schedule.name = 'CosineDecay', the Keras schedule that "
                f"has a warm-up (warmup_fraction = 0: none); received schedule.name = {name!r}"
            )
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
    jit_compile: bool | Literal["auto"] = "auto"
    """Compile the step with XLA; auto: on one GPU, if Keras can compile every layer; not on a CPU,
    where XLA is slower."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Maximum seconds between checkpoints. One is also saved after each epoch."""
    cluster_timeout_seconds: float = Field(default=120.0, gt=0)
    """Maximum seconds to wait for the other workers of a cluster."""
    limit_batches: _Count | None = None
    """Use only this many batches of each split. Validation and test then use a fixed sample of all
    classes."""
    step: str = Field(default="trainer.training.step:train_step", pattern=r"^[^:]+:[^:]+$")
    """The training step, "package.module:function"; docs/keras_fit.md describes its arguments."""

    @field_validator("class_weight", mode="before")
    @classmethod
    def _balanced_or_table(cls, value: Any) -> Any:
        if value in (None, "balanced") or isinstance(value, dict):
            return value
        raise ValueError(f"expected 'balanced' or {{ class = weight }}, received {value!r}")

    @field_validator("jit_compile", mode="before")
    @classmethod
    def _auto_or_bool(cls, value: Any) -> Any:
        if isinstance(value, bool) or value == "auto":
            return value
        raise ValueError(f"expected 'auto', true or false, received {value!r}")


class LoggingConfig(Section):
    """The run directory and its contents."""

    directory: _Folder = "runs"
    """Folder for the run directories."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run; default: the names of data set and model."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    histograms: bool = False
    """Write histograms of weights and gradient norms every epoch."""
    sample_images: int = Field(default=25, ge=0, le=100)
    """Number of training images in TensorBoard."""
    mistakes: int = Field(default=25, ge=0, le=100)
    """Number of most confident mistakes in TensorBoard."""
    profile: bool = False
    """Trace a few steps for TensorBoard's profiler page."""

    @model_validator(mode="after")
    def _require_tensorboard(self) -> Self:
        if not self.tensorboard and (self.histograms or self.profile):
            raise ValueError("histograms and profile are shown in TensorBoard: set tensorboard")
        return self


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

    @model_validator(mode="after")
    def _gradients_are_clipped_once(self) -> Self:
        given = self.optimizer.options.keys() & {"clipnorm", "clipvalue", "global_clipnorm"}
        if given and self.training.clip_norm is not None:
            raise ValueError(
                f"training.clip_norm and optimizer.options.{min(given)}: expected one of them"
            )
        return self

    def table(self, kind: type[SectionT]) -> SectionT:
        """Returns the table of a tool, with its defaults if the file has no such table.

        Args:
            kind: `TABLE` of the tool's module `config`.
        """
        found = [table for table in (self.model_extra or {}).values() if isinstance(table, kind)]
        return found[0] if found else kind()

    def flat(self) -> dict[str, Any]:
        """Returns the value of every key, by dotted name."""
        tables = self.model_dump()
        return {f"{t}.{key}": value for t, table in tables.items() for key, value in table.items()}

    def with_changes(self, changes: Mapping[str, Any]) -> "Config":
        """Returns a validated copy with some keys changed.

        Args:
            changes: Values by dotted key, for example `{"training.epochs": 1}`.
        """
        tree = self.model_dump()
        for key, value in changes.items():
            _put(tree, key, value)
        return parse_config(tree, origin="the changed configuration")

    def to_toml(self) -> str:
        """Returns the whole configuration as a TOML file that `load_config` reads back."""
        return "\n".join(
            f"[{name}]\n"
            + "".join(
                f"# {key} is not set\n" if value is None else f"{key} = {_toml(value)}\n"
                for key, value in section.items()
            )
            for name, section in self.model_dump().items()
        )


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Reads, changes and checks a configuration.

    Args:
        path: A TOML file.
        overrides: Changes as `"section.key=value"`, the value written in TOML. A word that is not
            a TOML value is read as a string, so `data.name=fashion_mnist` needs no quotes.
            Changing `model.name`, `data.name` or `optimizer.name` drops the file's options for
            the old name.
        stored: As in `parse_config`.

    Returns:
        The configuration, complete and frozen.

    Raises:
        InputError: The file is missing or is not TOML, a key is unknown, or a value has the wrong
            type or is out of range.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"expected a configuration file, received {path}: {_available_files(path)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a configuration: {error}") from None
    except (ValueError, RecursionError) as error:  # some errors of tomllib are only ValueErrors
        raise InputError(f"{path} is not TOML: {error}") from None
    changed = copy.deepcopy(tree)
    try:
        given = [parse_override(override) for override in overrides]
        for key, value in given:
            _forget_options(changed, key, value)
        for key, value in given:
            _put(changed, key, value)
        return parse_config(changed, origin="--set" if overrides else str(path), stored=stored)
    except InputError:
        parse_config(tree, origin=str(path), stored=stored)  # raises if the file itself is wrong
        raise


def _available_files(path: Path) -> str:
    found = sorted(
        str(p) for folder in {path.parent, Path("configs")} for p in folder.glob("*.toml")
    )
    if not found:
        return f"there is no *.toml in {path.parent} (relative to the current folder)"
    same = [name for name in found if Path(name).stem == path.name]
    return did_you_mean(same[0] if same else str(path), found)


def _forget_options(tree: dict[str, Any], key: str, value: Any) -> None:
    """Removes the options of a section if its name changes."""
    section, _, last = key.partition(".")
    table = tree.get(section)
    if last == "name" and isinstance(table, dict) and value != table.get("name"):
        table.pop("options", None)
        table.pop("unset_options", None)


def parse_config(tree: Mapping[str, Any], *, origin: str, stored: bool = False) -> Config:
    """Checks tables and returns them as a configuration.

    Args:
        tree: The tables of a TOML file.
        origin: The name of the source in error messages.
        stored: The tables were written by an earlier version: old names of keys are accepted, and
            tables of removed tools are ignored.

    Raises:
        InputError: One line about the first fault.
    """
    modules = tools.config_modules()
    known = [*Config.model_fields, *modules]
    tables = {name: copy.deepcopy(tree[name]) for name in tree if name in known or not stored}
    prefix = ""
    try:
        _require_known(tables, known)
        renamed = _RENAMED | {name: module.RENAMED for name, module in modules.items()}
        for section, names in renamed.items():
            _rename(tables.get(section), section, names, stored=stored)
        for name in modules.keys() & tables.keys():
            prefix = f"{name}."
            tables[name] = modules[name].TABLE.model_validate(tables[name])
        prefix = ""
        return Config.model_validate(tables)
    except ValueError as error:
        raise InputError(f"{origin}: {_explain(error, prefix)}") from None


def _rename(table: Any, section: str, names: Mapping[str, str], *, stored: bool) -> None:
    """Replaces old names of keys in a stored table; refuses them in any other table."""
    for old, new in names.items():
        if isinstance(table, dict) and old in table:
            if not stored:
                raise ValueError(f"{section}.{old} was renamed to {section}.{new}")
            table[new] = table.pop(old)


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `section.key=value` and reads the value as TOML (or as a bare word).

    Raises:
        InputError: There is no `=`, or the value is neither TOML nor a word.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that are not UTF-8
        raise InputError(f"--set expected UTF-8, received {text!r}")
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", key):
        raise InputError(f"--set expected section.key=value, received {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")
        if parsed.keys() == {"value"}:
            return key, parsed["value"]
    except (ValueError, RecursionError):
        if re.fullmatch(r"[A-Za-z_/~.][\w.:/~-]*", value):
            return key, value
    raise InputError(
        f'--set {key}: expected one TOML value (1, 0.5, true, "text", [1, 2]), received {value!r}'
    )


def config_schema() -> dict[str, Any]:
    """Returns the JSON schema of a configuration file, for editors."""
    tables: dict[str, Any] = {
        name: (module.TABLE, module.TABLE()) for name, module in tools.config_modules().items()
    }
    whole = create_model("Config", __base__=Config, __doc__=Config.__doc__, **tables)
    whole.model_config["extra"] = "forbid"
    return whole.model_json_schema()


def call_with_options(
    function: Callable[..., Any], *arguments: Any, options: Mapping[str, Any], where: str
) -> Any:
    """Calls `function(*arguments, **options)` after checking the options against its signature.

    Args:
        function: Its other parameters, with their annotations, are the schema of the options.
        arguments: Passed on unchanged.
        options: A table of the configuration.
        where: The name of the table, for the message.

    Raises:
        InputError: An option is unknown, missing, of the wrong type or out of range.
    """
    try:
        inspect.signature(function).bind_partial(*arguments)
        checked = _OptionSchema(function, len(arguments)).check(options)
    except (TypeError, ValueError) as error:
        raise InputError(_explain(error, f"{where}.")) from None
    return function(*arguments, **checked)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for name in tables:
        child = tree.setdefault(name, {})
        if child is None:
            child = tree[name] = {}
        if not isinstance(child, dict):
            raise InputError(f"{key}: {name} is a value, not a table; received {child!r}")
        tree = child
    tree[last] = value


def _explain(error: Exception, prefix: str) -> str:
    """Returns the key of an error, what was expected and what was received.

    Args:
        error: A pydantic ValidationError, or an error with a message of this module.
        prefix: Name of the table that was checked, with a dot; "" for the whole file.
    """
    if not isinstance(error, ValidationError):
        return f"{prefix.removesuffix('.')}: {error}".removeprefix(": ")
    fault = error.errors()[0]
    # For `float | int`, pydantic adds the type to the location.
    location = [str(part) for part in fault["loc"] if part not in ("float", "int")]
    key = (prefix + ".".join(location)).removesuffix(".")
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}".removeprefix(": ")
    if fault["type"] == "missing":
        return f"{key} is missing"
    expected = re.sub(r"^(Input|[A-Z]\w+) should (be )?", "", fault["msg"])
    return f"{key}: expected {expected}, received {_short(fault['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _toml(value: Any) -> str:
    """Writes one value as TOML (a JSON string is a TOML string)."""
    if isinstance(value, dict):
        items = (f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(items) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
