"""What a person can set: the only schema and the only defaults.

A configuration is read from a TOML file, changed by `--set section.key=value`, checked and frozen.
Every key that a file leaves out has the default written here.
"""

import contextlib
import copy
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
    validate_call,
)
from pydantic_core import PydanticSerializationError

from trainer import tools
from trainer.errors import InputError, did_you_mean

# How options are checked against the signature of a function.
_OPTION_RULES = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
# TOML has no tuples, and a whole number can stand for a float.
_SAME_KIND: dict[type, tuple[type, ...]] = {tuple: (tuple, list), int: (int, float)}
DEVICE_PATTERN = r"^(auto|cpu|gpu(:[0-9]{1,3})?|all)$"
_Side = Annotated[int, Field(ge=1, le=4096)]  # of an image, in pixels
# TOML has no tuples: an array is taken for one, its items checked strictly all the same.
ImageSize = Annotated[tuple[_Side, _Side], Field(strict=False)]
# A path: not empty, and without the byte that ends one.
_Folder = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class _NotTomlError(Exception):
    """A value is not what a TOML file can hold."""


class Section(BaseModel):
    """A table of the TOML file: typed, frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class KerasObject(Section):
    """A Keras object by name: `"Lion"`, or `{name = "EarlyStopping", options = {patience = 2}}`."""

    name: str = Field(description='A Keras name, or "package.module:Name" for one of your own')
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of its constructor")

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ModuleSection(Section):
    """A section that names a module of a folder and the options of its function."""

    name: str
    options: dict[str, Any] = {}
    unset_options: list[str] = Field(
        default=[], description="Options whose value is None, which TOML cannot write"
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of the function."""
        return self.options | dict.fromkeys(self.unset_options)

    def resolved(self, function: Callable[..., Any]) -> Self:
        """Returns a copy that also has the defaults of the function as options.

        A default that a TOML file cannot hold, or that the function would not take from one, is
        left out.

        Args:
            function: Called with one positional argument and the options.
        """
        arguments = self.arguments
        parameters = [*inspect.signature(function, eval_str=True).parameters.values()][1:]
        for parameter in parameters:
            if parameter.name not in arguments and parameter.default is not parameter.empty:
                with contextlib.suppress(_NotTomlError):
                    arguments[parameter.name] = _default_option(parameter)
        given = {name: value for name, value in arguments.items() if value is not None}
        unset = [name for name in arguments if name not in given]
        return self.model_copy(update={"options": given, "unset_options": unset})


class DataConfig(ModuleSection):
    """Which images, from where, and how they reach the device."""

    name: str = Field(
        default="mnist",
        description="A module of trainer/data, or any image-classification set of "
        "tensorflow-datasets",
    )
    options: dict[str, Any] = Field(default={}, description="Options of a module of trainer/data")
    directory: _Folder = Field(default="data", description="Folder that keeps prepared data")
    archives: _Folder | None = Field(
        default=None,
        description="Folder with the original archives; the environment variable "
        "TRAINER_DATA_FILES is used where this is not set",
    )
    allow_sample: bool = Field(
        default=True,
        description="Let mnist fall back on 5,000 of its images when nothing else is to be had",
    )
    image_size: ImageSize | None = Field(
        default=None,
        description="[height, width] to resize to; needed where the images differ in size",
    )
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of train held out for validation"
    )
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of train held out where a set has no test split"
    )
    split_seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of what is held out")
    train_on_validation: bool = Field(
        default=False,
        description="Also train on the validation images, when nothing is left to be chosen",
    )
    placement: Literal["auto", "device", "stream"] = Field(
        default="auto",
        description="Keep the images on the device, or stream them; auto: by device_limit_mb",
    )
    device_limit_mb: int = Field(
        default=1024, ge=0, description="Largest set, in MB (10^6 bytes), that auto keeps there"
    )
    augmentation: list[KerasObject] = Field(
        default=[],
        description="Keras layers that alter training images (uint8 in, uint8 out), in order",
    )


class ModelConfig(ModuleSection):
    """Which network."""

    name: str = Field(default="cnn", description="A module of trainer/models")
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of its build()")


class OptimizerConfig(Section):
    """Which optimizer, and how its learning rate changes."""

    name: str = Field(default="Adam", description="A Keras optimizer")
    learning_rate: float = Field(default=1e-3, gt=0, description="Constant or peak learning rate")
    learning_rate_scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none",
        description="Multiply learning_rate by the number of devices, or by its square root; for "
        "a batch_size that was raised with it",
    )
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the optimizer")
    schedule: KerasObject | None = Field(
        default=None,
        description="A Keras learning-rate schedule. Left out of its options, "
        "initial_learning_rate is learning_rate and decay_steps is the number of steps of the run",
    )
    warmup_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the run's steps in which CosineDecay climbs to learning_rate",
    )

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
    """How the network is trained."""

    epochs: int = Field(default=3, ge=1, lt=2**31, description="How often to go through the images")
    batch_size: int = Field(
        default=128, ge=1, lt=2**31, description="Images a step, over all devices"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of weights, order and dropout")
    device: str = Field(
        default="auto",
        pattern=DEVICE_PATTERN,
        description="auto | cpu | gpu | gpu:N | all",
    )
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        default="auto", description="auto: bfloat16 where the processor multiplies it faster"
    )
    deterministic: bool = Field(
        default=False, description="Refuse every operation whose result can vary between runs"
    )
    loss: KerasObject = Field(
        default=KerasObject(name="SparseCategoricalCrossentropy"), description="A Keras loss"
    )
    metrics: list[KerasObject] = Field(
        default=[KerasObject(name="SparseCategoricalAccuracy", options={"name": "accuracy"})],
        description="Keras metrics, in order",
    )
    callbacks: list[KerasObject] = Field(default=[], description="Keras callbacks, in order")
    clip_norm: float | None = Field(
        default=None, gt=0, description="Largest global norm of the gradients"
    )
    step: str = Field(
        default="trainer.training.step:train_step",
        pattern=r"^[^:]+:[^:]+$",
        description="The function of one training step, as package.module:function",
    )
    steps_per_execution: int = Field(
        default=50, ge=1, lt=2**31, description="Steps in one call of the compiled loop"
    )
    jit_compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Compile the step with XLA: true, false, or auto: on one GPU if Keras can "
        "compile every layer, not on a CPU, where it is slower",
    )
    checkpoint_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Longest time between checkpoints; one is written after each epoch, too",
    )
    cluster_timeout_seconds: float = Field(
        default=120.0, gt=0, description="Longest wait for the other machines of a cluster"
    )
    limit_batches: int | None = Field(
        default=None,
        ge=1,
        lt=2**31,
        description="Use only this many batches of each split; scored is a fixed sample of all "
        "classes",
    )

    @field_validator("jit_compile", mode="before")
    @classmethod
    def _auto_or_bool(cls, value: Any) -> Any:
        if isinstance(value, bool) or value == "auto":
            return value
        raise ValueError(f"expected 'auto', true or false, received {value!r}")


class LoggingConfig(Section):
    """What is written down."""

    directory: _Folder = Field(default="runs", description="Folder that holds the run directories")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,  # of the 255 bytes that file systems take
        description="Name of the run; the data set's and the model's where it is not set",
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard files")
    histograms: bool = Field(
        default=False, description="Histograms of weights and of gradient norms, an epoch"
    )
    sample_images: int = Field(default=25, ge=0, le=100, description="Training images shown")
    mistakes: int = Field(default=25, ge=0, le=100, description="Confident mistakes shown")
    profile: bool = Field(default=False, description="Trace a few steps for the profiler page")

    @model_validator(mode="after")
    def _pictures_need_tensorboard(self) -> Self:
        if not self.tensorboard and (self.histograms or self.profile):
            raise ValueError("histograms and profile are shown in TensorBoard: set tensorboard")
        return self


# Old keys of the configuration, and their new names.
_RENAMED = {
    "training.steps_per_call": "training.steps_per_execution",
    "data.files": "data.archives",
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
        """Returns the table of a tool; all of its defaults if the file has no such table.

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
        """Returns a copy with some keys changed, checked again.

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
        overrides: Changes as `"section.key=value"`, the value written in TOML. A word that is no
            TOML value is taken for a string, so `data.name=fashion_mnist` needs no quotes. A
            change of `model.name`, `data.name` or `optimizer.name` drops the file's options of
            what was named before: they are those of another function.
        stored: As `parse_config` takes it.

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
        folders = {path.parent, Path("configs")}
        found = sorted(str(p) for folder in folders for p in folder.glob("*.toml"))
        same = [name for name in found if Path(name).stem == path.name]
        known = (
            did_you_mean(same[0] if same else str(path), found)
            if found
            else f"there is no *.toml in {path.parent} (`trainer` looks from the folder you are in)"
        )
        raise InputError(f"expected a configuration file, received {path}: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a configuration: {error}") from None
    except (ValueError, RecursionError) as error:  # tomllib's own is a ValueError, others escape it
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
        parse_config(tree, origin=str(path), stored=stored)  # the file's own fault, if it has one
        raise


def _forget_options(tree: dict[str, Any], key: str, value: Any) -> None:
    """Drops the options of a section whose name is changed to another."""
    section, _, last = key.partition(".")
    table = tree.get(section)
    if last == "name" and isinstance(table, dict) and value != table.get("name"):
        table.pop("options", None)
        table.pop("unset_options", None)


def parse_config(tree: Mapping[str, Any], *, origin: str, stored: bool = False) -> Config:
    """Checks a tree of tables and returns it as a configuration.

    Args:
        tree: The tables of a TOML file.
        origin: What the error message calls the source.
        stored: The tree was written by an earlier version: renamed keys are accepted under their
            old names, and tables of tools that were removed are ignored.

    Raises:
        InputError: With one line for the first fault found, which names `origin`.
    """
    modules = tools.config_modules()
    known = [*Config.model_fields, *modules]
    unknown = [name for name in tree if name not in known]
    if unknown and not stored:
        suggestion = did_you_mean(unknown[0], known)
        raise InputError(f"{origin}: unknown key {unknown[0]!r}: {suggestion}")
    renamed = dict(_RENAMED)
    for name, module in modules.items():
        renamed |= {f"{name}.{old}": f"{name}.{new}" for old, new in module.RENAMED.items()}
    tables = {name: table for name, table in tree.items() if name in known}
    tables = _with_new_names(tables, renamed, None if stored else origin)
    for name in modules.keys() & tables.keys():
        tables[name] = _validated(modules[name].TABLE, tables[name], origin, f"{name}.")
    return _validated(Config, tables, origin)


def _validated(kind: type[SectionT], tree: Any, origin: str, prefix: str = "") -> SectionT:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: {_explain(error, kind, prefix)}") from None


def _with_new_names(
    tree: Mapping[str, Any], renamed: Mapping[str, str], origin: str | None
) -> dict[str, Any]:
    """Returns a copy of a tree in which renamed keys have their new names.

    Args:
        tree: Tables by name.
        renamed: New dotted keys by old ones.
        origin: Refuse old keys, and name this source; None: accept them.

    Raises:
        InputError: The tree has an old key that is refused.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(tree))
    for old, new in renamed.items():
        section, _, key = old.partition(".")
        table = changed.get(section)
        if isinstance(table, dict) and key in table:
            if origin is not None:
                raise InputError(f"{origin}: {old} was renamed to {new}")
            table[new.partition(".")[2]] = table.pop(key)
    return changed


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `section.key=value` and reads the value as TOML (or as a bare word).

    Raises:
        InputError: There is no `=`, or the value is neither TOML nor a word.
    """
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
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
        function: Its keyword parameters, with their annotations, are the schema of the options.
        arguments: Passed on as they are.
        options: A table of the configuration.
        where: The table's name, for the message.

    Raises:
        InputError: An option is unknown, missing, of the wrong type or out of range.
    """
    _check_names(function, arguments, options, where)
    checked = validate_call(config=_OPTION_RULES)(function)
    parameters = inspect.signature(function, eval_str=True).parameters
    given = {
        name: _for_hint(value, parameters[name].annotation) if name in parameters else value
        for name, value in options.items()
    }
    try:
        return checked(*arguments, **given)
    except ValidationError as error:
        if error.title != getattr(function, "__name__", None):
            raise  # not about this call: a fault inside the function
        raise InputError(f"{where}: {_explain(error, KerasObject)}") from None


def _for_hint(value: Any, hint: Any) -> Any:
    """Returns an array of TOML as a tuple if that is what a parameter takes."""
    return tuple(value) if isinstance(value, list) and _is_tuple(hint) else value


def _is_tuple(hint: Any) -> bool:
    if get_origin(hint) in (Annotated, Union, UnionType):
        return any(map(_is_tuple, get_args(hint)))
    return tuple in (hint, get_origin(hint))


def _default_option(parameter: inspect.Parameter) -> Any:
    """Returns the default of a parameter as the value of an option, as TOML gives it.

    Raises:
        _NotTomlError: TOML cannot hold it, or the parameter would not take it from there.
    """
    hint = Any if parameter.annotation is parameter.empty else parameter.annotation
    try:
        # In a tuple, because pydantic takes no rules for a type that has its own.
        one: Any = GenericAlias(tuple, (hint,))
        adapter = TypeAdapter(one, config=_OPTION_RULES)
        (plain,) = adapter.dump_python((parameter.default,), mode="json", warnings="error")
        read = None if plain is None else tomllib.loads(f"value = {_toml(plain)}")["value"]
        (taken,) = adapter.validate_python((_for_hint(read, hint),))
        again = adapter.dump_python((taken,), mode="json", warnings="error")
    except (PydanticUserError, PydanticSerializationError, ValueError) as error:
        raise _NotTomlError from error
    kind = type(parameter.default)
    if again != [plain] or not isinstance(taken, _SAME_KIND.get(kind, kind)):
        raise _NotTomlError
    return read


def _check_names(
    function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any], where: str
) -> None:
    """Refuses options that are unknown or missing."""
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        known = [
            p.name
            for p in list(signature.parameters.values())[len(arguments) :]
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        unknown = [name for name in options if name not in known]
        if unknown:
            hint = did_you_mean(unknown[0], known) if known else "it takes none"
            raise InputError(f"{where}: unknown option {unknown[0]!r}: {hint}") from None
        name = getattr(function, "__name__", repr(function))
        takes = f"takes the options {', '.join(known)}" if known else "takes no options"
        raise InputError(f"{where}: {error}; {name}() {takes}") from None


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


def _explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    fault = error.errors()[0]
    # Of a number that may be whole or not, pydantic adds which of them it tried.
    key = prefix + ".".join(str(part) for part in fault["loc"] if part not in ("float", "int"))
    if fault["type"] == "extra_forbidden":
        known = did_you_mean(str(fault["loc"][-1]), _keys_beside(root, fault["loc"]))
        return f"unknown key {key!r}: {known}"
    if fault["type"] == "value_error":
        return f"{key.removesuffix('.')}: {fault['ctx']['error']}".removeprefix(": ")
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "string_pattern_mismatch":
        expected = f"text that matches {fault['ctx']['pattern']}"
        if fault["ctx"]["pattern"] == DEVICE_PATTERN:
            expected = "auto, cpu, gpu, gpu:N or all"
    else:
        expected = re.sub(r"^(Input|[A-Z]\w+) should (be )?", "", fault["msg"])
        expected = expected.replace(
            "a valid dictionary or instance of KerasObject", "a name or { name, options }"
        )
    return f"{key}: expected {expected}, received {_shown(fault['input'])}"


def _keys_beside(section: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Returns the keys that are known where an unknown one was found.

    Args:
        section: The class that was validated.
        location: The path of the unknown key.
    """
    if len(location) > 1 and location[0] not in section.model_fields:
        section = KerasObject  # within a list of them, in a table of options
    for part in location[:-1]:
        if part not in section.model_fields:  # a place in a list, or a key of a space
            continue
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(
            c
            for c in candidates
            if get_origin(c) is None and isinstance(c, type) and issubclass(c, BaseModel)
        )
    return list(section.model_fields)


def _shown(value: Any) -> str:
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
