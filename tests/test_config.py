import json
import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from trainer import tools
from trainer.config import (
    Config,
    KerasObject,
    ModelConfig,
    Section,
    call_with_options,
    config_schema,
    parse_config,
)
from trainer.config_file import load_config, parse_override
from trainer.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
SECTIONS = list(Config.model_fields)

# A slow machine must not fail the tests.
CALM = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Values of TOML for the tables of options. A separate test has a key with DEL.
KEYS = st.text(max_size=6).filter(lambda key: "\x7f" not in key)
TIMES = (st.times() | st.datetimes()).map(lambda time: time.replace(fold=0))
SCALARS = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS | st.dates() | TIMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def drawn_from(annotation: Any, *bounds: Any) -> st.SearchStrategy[Any]:
    """Draws valid values of a field, so that every new field is tested."""
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return st.one_of([drawn_from(a, *bounds) for a in inner])
    if kind is Annotated:
        within = [limit for b in inner[1:] for limit in getattr(b, "metadata", [b])]
        return drawn_from(inner[0], *within, *bounds)
    if kind is Literal:
        return st.sampled_from(inner)
    if kind is list:
        return st.lists(drawn_from(inner[0]), max_size=2)
    if kind is tuple:
        return st.tuples(*map(drawn_from, inner))
    if kind is dict:
        return st.dictionaries(
            KEYS, drawn_from(inner[1]) if inner[1:] != (Any,) else VALUES, max_size=3
        )
    if issubclass(kind, Section):
        return section(kind)
    patterns = [b.pattern for b in bounds if hasattr(b, "pattern")]
    if kind is str and patterns:
        ascii_only = st.characters(codec="ascii")
        return st.from_regex(patterns[0], fullmatch=True, alphabet=ascii_only)
    assert kind in (str, bool, int, float, NoneType)
    numeric = kind in (int, float)
    limits = [b for b in bounds if numeric and isinstance(b, annotated_types.BaseMetadata)]
    if kind is float:
        limits.append(annotated_types.Predicate(math.isfinite))
    return st.from_type(Annotated[kind, *limits] if limits else kind)


def section(model: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    def field(info: FieldInfo) -> st.SearchStrategy[Any]:
        return drawn_from(info.annotation, *info.metadata)

    def in_order(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: tree[name] for name in model.model_fields}

    fields = {name: field(info) for name, info in model.model_fields.items()}
    return st.fixed_dictionaries(fields).map(in_order).map(agreeing)


def agreeing(tree: dict[str, Any]) -> dict[str, Any]:
    """Changes values that exclude each other."""
    if tree.get("warmup_fraction"):
        tree["schedule"] = {"name": "CosineDecay", "options": {}}
    if tree.get("histograms") or tree.get("profile"):
        tree["tensorboard"] = True
    if "space" in tree:
        tree["space"] = {}  # tested with the tool
    return tree


def written(value: Any) -> str:
    """A second, independent writer of TOML."""
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(character):08X}" for character in value) + '"'
    if isinstance(value, bool):
        return repr(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(k)} = {written(v)}" for k, v in value.items()) + "}"
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Loads a file with the given content and overrides."""

    def load(content: str | bytes, *overrides: str) -> Config:
        path = tmp_path / "given.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_config(path, overrides)

    return load


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Returns the message of the InputError; it must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_an_empty_file_gives_the_defaults(load: Callable[..., Config]) -> None:
    config = load("")
    assert config == Config() == Config.model_validate({})
    assert (config.data.name, config.model.name, config.optimizer.name) == ("mnist", "cnn", "Adam")
    assert (config.training.epochs, config.training.device) == (3, "auto")
    assert config.training.loss.name == "SparseCategoricalCrossentropy"
    (metric,) = config.training.metrics
    assert metric.options == {"name": "accuracy"}
    assert (config.logging.directory, config.logging.name) == ("runs", None)


def test_a_file_changes_only_its_own_keys(load: Callable[..., Config]) -> None:
    config = load(
        "[data]\noptions = { examples = 9 }\nimage_size = [8, 6]\n[optimizer]\nlearning_rate = 1\n"
        '[training]\nprecision = "float32"\n'
    )
    assert config.data.options == {"examples": 9}
    assert config.data.image_size == (8, 6)
    assert config.training.precision == "float32"
    assert isinstance(config.optimizer.learning_rate, float)  # from the integer 1
    rest = config.model_dump()
    for name, key in [
        ("data", "options"),
        ("data", "image_size"),
        ("optimizer", "learning_rate"),
        ("training", "precision"),
    ]:
        rest[name][key] = Config().model_dump()[name][key]
    assert rest == Config().model_dump()


@CALM
@given(tree=section(Config))
def test_every_configuration_is_equal_after_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    config = parse_config(tree, origin="drawn")
    assert repr(config.model_dump()) == repr(tree)  # repr: 1, 1.0 and True are not the same
    path = tmp_path_factory.getbasetemp() / "drawn.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert repr(load_config(path)) == repr(config)


def test_a_key_can_contain_every_character(load: Callable[..., Config]) -> None:
    key = "".join(map(chr, range(1, 256)))
    config = Config().with_changes({"model.options": {key: key}})
    assert load(config.to_toml()) == config


@CALM
@given(value=VALUES)
def test_set_accepts_every_toml_value(value: Any) -> None:
    key, parsed = parse_override(f"model.options.anything = {written(value)}")
    assert key == "model.options.anything"
    assert repr(parsed) == repr(value)


@CALM
@given(word=st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:/-]*", fullmatch=True))
def test_set_reads_a_word_as_a_string(word: str) -> None:
    toml = {"true": True, "false": False, "inf": float("inf")}
    if word != "nan":
        assert parse_override(f"data.name={word}") == ("data.name", toml.get(word, word))


def test_set_options_are_applied_in_order(load: Callable[..., Config]) -> None:
    config = load(
        '[data]\nname = "fashion_mnist"\noptions = { examples = 9 }\n',
        "data.name=fashion_mnist",
        "data.options.height=3",
        "data.options.nested.deep=[1, 2.5, 'three', true]",
        "training.device = gpu:1",
        "training.epochs=1",
        "training.epochs=2",
        'optimizer.schedule={name = "CosineDecay"}',
        "optimizer.schedule.options.alpha=0.5",
        "logging.directory='a=b'",
    )
    assert config.data.name == "fashion_mnist"
    nested = {"deep": [1, 2.5, "three", True]}
    assert config.data.options == {"examples": 9, "height": 3, "nested": nested}
    assert (config.training.device, config.training.epochs) == ("gpu:1", 2)
    assert config.optimizer.schedule is not None
    assert config.optimizer.schedule.options == {"alpha": 0.5}
    assert config.logging.directory == "a=b"


@pytest.mark.parametrize(
    "override",
    [
        "training.epochs",  # no "="
        "",
        "=1",
        "epochs=1",  # no section
        "training=1",
        ".epochs=1",
        "training.=1",
        "training..epochs=1",
        "training.1=1",
        "training.e pochs=1",
        '"training".epochs=1',
        "training.epo\nchs=1",
    ],
)
def test_set_refuses_invalid_keys(load: Callable[..., Config], override: str) -> None:
    message = refused(load, "", override)
    assert message == f"--set expected section.key=value, received {override!r}"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "=",
        "two words",
        "1\ndata.name = 2",  # two statements
        "1\nother = 2",
        "1\n[data]",
        "{a = 1}\nvalue.b = 2",
        "[1",
        "'open",
        "01",
        "-word",
        "a'b",
        "1979-13-01",
    ],
)
def test_set_refuses_invalid_values(load: Callable[..., Config], value: str) -> None:
    message = refused(load, "", f"data.options.x={value}")
    assert message.startswith("--set data.options.x: expected one TOML value")
    assert message.endswith(f"received {value.strip()!r}")


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 2000 + "]" * 2000], ids=["digits", "nested"])
def test_values_that_the_parser_cannot_read_are_refused(
    load: Callable[..., Config], value: str
) -> None:
    refused(load, f"model.options.x = {value}")
    refused(load, "", f"model.options.x={value}")


@pytest.mark.parametrize(
    ("content", "override", "said"),
    [
        ("[data]\nname = 'a'", "data.name.x=1", "data.name.x: name is a value, not a table; "),
        ("training = 3", "training.epochs=1", "training.epochs: training is a value, not a table"),
        (
            "",
            ["data.archives=1", "data.archives.x=1"],
            "data.archives.x: archives is a value, not a table",
        ),
        ("", "data.name.x=1", "data.name: expected a valid string, received {'x': 1}"),
        ("", "data.options=1", "data.options: expected a valid dictionary, received 1"),
        ("data = 1", "model.name=a", "data: expected a valid dictionary, received 1"),
    ],
)
def test_a_value_in_place_of_a_table_is_refused(
    load: Callable[..., Config], content: str, override: str | list[str], said: str
) -> None:
    overrides = [override] if isinstance(override, str) else override
    assert said in refused(load, content, *overrides)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("data.image_size=[1, 2, 3]", "at most 2 items, received [1, 2, 3]"),
        ("logging.name='/'", "text that matches '^[A-Za-z0-9][A-Za-z0-9._-]*$', received '/'"),
        ("training.metrics=3", "a valid list, received 3"),
        # Errors of other keys are not part of the message.
        ("training={jit_compile=1, limit_batches=0}", "'auto' or a valid boolean, received 1"),
    ],
)
def test_a_wrong_value_is_described_in_words(
    load: Callable[..., Config], content: str, expected: str
) -> None:
    assert refused(load, content).endswith(f": expected {expected}")


@pytest.mark.parametrize(
    ("override", "path", "near"),
    [
        ("dat.name=a", "dat", "data"),
        ("modle.name=a", "modle", "model"),
        ("training.epoch=1", "training.epoch", "epochs"),
        ("data.Placement=auto", "data.Placement", "placement"),
        ("training.loss={name='a', option={}}", "training.loss.option", "options"),
        ("optimizer.schedule={name='a', nmae='b'}", "optimizer.schedule.nmae", "name"),
        (
            "training.metrics=[{name='a'}, {name='b', optons={}}]",
            "training.metrics.1.optons",
            "options",
        ),
        ("data.augmentation=[{name='a', optons={}}]", "data.augmentation.0.optons", "options"),
    ],
)
def test_an_unknown_key_suggests_a_similar_one(
    load: Callable[..., Config], override: str, path: str, near: str
) -> None:
    message = refused(load, "", override)
    *tables, key = path.split(".")
    table = f"{'.'.join(tables)}: " if tables else ""
    assert (
        f"given.toml and --set: {table}unknown key {key!r}: did you mean {near!r}? available: "
        in message
    )
    beside = (
        [*SECTIONS, *tools.config_modules()]
        if not tables
        else Config().model_dump().get(tables[0], {})
    )
    beside = ["name", "options"] if len(tables) > 1 else beside
    listed = message.partition("available: ")[2].partition(", …")[0].split(", ")
    assert listed == sorted(beside)[:12]


@pytest.mark.parametrize(
    ("key", "value", "received"),
    [
        ("training.epochs", "true", "True"),
        ("training.epochs", '"1"', "'1'"),
        ("training.epochs", "1.0", "1.0"),
        ("training.epochs", "[1]", "[1]"),
        ("training.clip_norm", "true", "True"),
        ("training.clip_norm", '"1"', "'1'"),
        ("training.deterministic", "1", "1"),
        ("training.deterministic", '"true"', "'true'"),
        ("training.callbacks", "{}", "{}"),
        ("data.name", "1", "1"),
        ("data.archives", "false", "False"),
        ("data.options", "[]", "[]"),
        ("data.image_size", "28", "28"),
        ("data.image_size", '"ab"', "'ab'"),
        ("data.image_size", "[1, 2, 3]", "[1, 2, 3]"),
        ("data.image_size.0", "[28.0, 28]", "28.0"),
        ("data.image_size.0", '["28", 28]', "'28'"),
        ("data.image_size.1", "[28, true]", "True"),
        ("optimizer.learning_rate", '"0.1"', "'0.1'"),
        ("optimizer.learning_rate", "true", "True"),
        ("optimizer.learning_rate", "nan", "nan"),
        ("optimizer.learning_rate", "inf", "inf"),
        ("optimizer.learning_rate", "-inf", "-inf"),
        ("optimizer.schedule", "1", "1"),
        ("training.device", "tpu", "'tpu'"),
        ("training.device", "gpu:", "'gpu:'"),
        ("logging.name", "'../x'", "'../x'"),
        ("logging.name", "''", "''"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    load: Callable[..., Config], key: str, value: str, received: str
) -> None:
    message = refused(load, "", f"{key.removesuffix('.0').removesuffix('.1')}={value}")
    assert f"given.toml and --set: {key}: expected " in message
    assert message.endswith(f", received {received}")


@pytest.mark.parametrize(
    ("key", "value", "bounds"),
    [
        ("training.epochs", "0", "greater than or equal to 1"),
        ("training.epochs", "-1", "greater than or equal to 1"),
        ("training.batch_size", "0", "greater than or equal to 1"),
        ("training.seed", "-1", "greater than or equal to 0"),
        ("data.split_seed", "-1", "greater than or equal to 0"),
        ("training.seed", "2147483648", "less than 2147483648"),
        ("training.epochs", "2147483648", "less than 2147483648"),
        ("training.batch_size", "1" + "0" * 30, "less than 2147483648"),
        ("data.split_seed", "4294967296", "less than 4294967296"),
        ("training.clip_norm", "0.0", "greater than 0"),
        ("training.limit_batches", "0", "greater than or equal to 1"),
        ("training.precision", "'float64'", "'float32', 'mixed_bfloat16' or 'mixed_float16'"),
        ("data.validation_fraction", "0", "greater than 0"),
        ("data.validation_fraction", "1.0", "less than 1"),
        ("data.placement", "'gpu'", "'auto', 'device' or 'stream'"),
        ("optimizer.learning_rate", "0", "greater than 0"),
        ("optimizer.warmup_fraction", "1", "less than 1"),
        ("logging.sample_images", "101", "less than or equal to 100"),
    ],
)
def test_a_value_out_of_range_is_refused(
    load: Callable[..., Config], key: str, value: str, bounds: str
) -> None:
    message = refused(load, "", f"{key}={value}")
    assert f"{key}: expected " in message
    assert message.endswith(f"{bounds}, received {value}")


def test_long_values_are_shortened(load: Callable[..., Config]) -> None:
    message = refused(load, "", f"training.epochs={list(range(1000))}")
    assert len(message) < 350


def test_a_missing_key_is_named(load: Callable[..., Config]) -> None:
    assert refused(load, "[training]\nloss = {}").endswith(": training.loss.name is missing")
    message = refused(load, "", "optimizer.schedule.options.alpha=1")
    assert message.endswith(": optimizer.schedule.name is missing")


@pytest.mark.parametrize("schedule", [None, "ExponentialDecay"])
def test_warmup_needs_cosine_decay(load: Callable[..., Config], schedule: str | None) -> None:
    overrides = [f"optimizer.schedule.name={schedule}"] if schedule else []
    message = refused(load, "", "optimizer.warmup_fraction=0.1", *overrides)
    assert "optimizer: warmup_fraction expects schedule.name = 'CosineDecay'" in message
    config = load("[optimizer]\nwarmup_fraction = 0.1", "optimizer.schedule.name=CosineDecay")
    assert config.optimizer.warmup_fraction == 0.1


def test_a_name_is_an_object_without_options(load: Callable[..., Config]) -> None:
    config = load("[training]\ncallbacks = ['TerminateOnNaN']", "training.loss=Poisson")
    assert config.training.callbacks == [KerasObject(name="TerminateOnNaN")]
    assert config.training.loss == KerasObject(name="Poisson")
    message = refused(load, "", "training.loss=1")
    assert "training.loss: expected a valid dictionary" in message


def test_the_message_names_the_source_of_the_error(load: Callable[..., Config]) -> None:
    wrong = "[training]\nepochs = 0"
    assert "given.toml: training.epochs" in refused(load, wrong)
    assert "given.toml and --set: training.seed" in refused(load, "", "training.seed=-1")
    assert load(wrong, "training.epochs=1").training.epochs == 1


def test_a_missing_file_lists_the_available_files(in_tmp_path: Path) -> None:
    message = refused(load_config, "a.toml")
    assert message.startswith("there is no configuration file a.toml: available: configs/")
    for name in ("mnist.toml", "other.toml", "notes.txt"):
        (in_tmp_path / name).touch()
    message = refused(load_config, "minst.toml")
    assert "minst.toml: did you mean 'mnist.toml'? available: configs/" in message
    assert message.endswith(", mnist.toml, other.toml")
    (in_tmp_path / "configs").mkdir()
    (in_tmp_path / "configs" / "deep.toml").touch()
    for name in ("deep.toml", "configs/dep.toml"):
        assert "did you mean 'configs/deep.toml'?" in refused(load_config, name)


def test_invalid_toml_is_refused(tmp_path: Path, load: Callable[..., Config]) -> None:
    assert "given.toml cannot be read as TOML: " in refused(load, "[data\n")
    assert "line 2" in refused(load, "[data]\nname = mnist\n")
    assert "cannot be read" in refused(load, "[data]\nname = 'é'".encode("latin-1"))
    folder = refused(load_config, tmp_path)
    assert folder.startswith(f"expected a TOML file, received the folder {tmp_path}: `trainer fit ")
    assert load("[data]\nname = 'é'").data.name == "é"  # with every encoding of the system


def test_a_configuration_is_frozen() -> None:
    config = Config()
    for target, name, value in [
        (config, "training", config.training),
        (config.training, "epochs", 5),
        (config.training.loss, "name", "MeanSquaredError"),
        (config.training, "unknown", 5),
    ]:
        with pytest.raises(ValidationError):
            setattr(target, name, value)
    config.data.options["examples"] = 5  # a table is a dict: the next Config must not share it
    config.training.metrics.clear()
    assert Config().data.options == {}
    assert Config().training.metrics


def test_with_changes_does_not_change_the_original() -> None:
    config = Config().with_changes({"model.options": {"units": [3]}})
    before = config.model_dump()
    changed = config.with_changes(
        {
            "training.epochs": 7,
            "model.options.dropout": 0.5,
            "optimizer.schedule.name": "CosineDecay",  # the table does not exist yet
            "optimizer.warmup_fraction": 0.5,
            "data.image_size": (3, 4),
            "logging.name": None,
        }
    )
    assert config.model_dump() == before
    assert changed.training.epochs == 7
    assert changed.model.options == {"units": [3], "dropout": 0.5}
    assert changed.optimizer.schedule is not None
    assert changed.optimizer.schedule.name == "CosineDecay"
    assert changed.data.image_size == (3, 4)
    assert config.with_changes({}) == config
    changed.model.options["units"].append(4)
    assert config.model_dump() == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.epochs", 0, "training.epochs: expected greater than or equal to 1, received 0"),
        ("training.epoch", 1, "training: unknown key 'epoch': did you mean 'epochs'? available: "),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate: expected a finite "),
        ("optimizer.warmup_fraction", 0.5, "optimizer: warmup_fraction expects schedule.name"),
    ],
)
def test_with_changes_checks_again(key: str, value: Any, said: str) -> None:
    message = refused(Config().with_changes, {key: value})
    assert message.startswith(f"the changed configuration: {said}")
    below = refused(Config().with_changes, {"data.name.x": 1})
    name = Config().data.name
    assert below == f"data.name.x: name is a value, not a table; received {name!r}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path, load: Callable[..., Config]) -> None:
    config = load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# ")  # a description
    assert load(config.to_toml()) == config
    assert set(described(tomllib.loads(path.read_text(encoding="utf-8")))) <= set(schema_keys())


def test_the_default_configuration_is_shipped() -> None:
    assert "mnist.toml" in [path.name for path in CONFIGS]


def described(tree: dict[str, Any]) -> Iterator[str]:
    for name, table in tree.items():
        yield from (f"{name}.{key}" for key in (table if name != "extends" else ()))


def schema_keys() -> dict[str, dict[str, Any]]:
    """Returns the JSON schema of each section.key, with references resolved."""
    schema = config_schema()

    def resolved(entry: dict[str, Any]) -> dict[str, Any]:
        reference = entry.get("$ref", "").removeprefix("#/$defs/")
        return schema["$defs"][reference] if reference else entry

    return {
        f"{name}.{key}": entry
        for name, section in schema["properties"].items()
        if name != "extends"
        for key, entry in resolved(section)["properties"].items()
    }


def test_the_schema_has_every_key_of_the_file() -> None:
    schema = json.loads(json.dumps(config_schema()))  # must be JSON
    assert schema["properties"].pop("extends")["type"] == "string"
    assert list(schema["properties"]) == [*SECTIONS, *tools.config_modules()]
    for definition in (schema, *schema["$defs"].values()):
        assert definition["type"] == "object"
        assert definition["additionalProperties"] is False
        assert definition["description"]
    keys = schema_keys()
    defaults = Config().model_dump(mode="json")
    keys = {key: entry for key, entry in keys.items() if key.partition(".")[0] in SECTIONS}
    assert list(keys) == [f"{name}.{key}" for name in SECTIONS for key in defaults[name]]
    for key, entry in keys.items():
        name, _, last = key.partition(".")
        assert entry["default"] == defaults[name][last], key
    assert keys["training.epochs"]["minimum"] == 1
    assert keys["optimizer.learning_rate"]["exclusiveMinimum"] == 0
    assert keys["data.placement"]["enum"] == ["auto", "device", "stream"]
    references = json.dumps(schema).count('"$ref"')
    known = sum(json.dumps(schema).count(f'"#/$defs/{name}"') for name in schema["$defs"])
    assert references == known > 0


def test_every_key_has_a_description() -> None:
    assert [key for key, entry in schema_keys().items() if not entry.get("description")] == []


def sample(
    path: str,
    *,
    count: Annotated[int, Field(ge=1)] = 3,
    scale: float = 1.0,
    names: list[str] | None = None,
) -> tuple[str, int, float, list[str] | None]:
    if names == ["inner"]:
        parse_config({"training": {"epochs": 0}}, origin="inner")
    if names == ["value"]:
        raise ValueError("unchanged")
    return path, count, scale, names


def no_options(path: str) -> str:
    return path


def required(path: str, *, folder: str, count: int = 1) -> tuple[str, str, int]:
    return path, folder, count


def required_too(path: str, folder: str) -> tuple[str, str]:
    return path, folder


def every_option(_: str, **options: Any) -> dict[str, Any]:
    return options


def test_options_are_checked_against_a_signature() -> None:
    def call(function: Callable[..., Any] = sample, **options: Any) -> Any:
        return call_with_options(function, "a", options=options, where="some.options")

    assert call() == ("a", 3, 1.0, None)
    assert call(count=5, names=["b"]) == ("a", 5, 1.0, ["b"])
    assert refused(call, cuont=5) == (
        "some.options: unknown option 'cuont': did you mean 'count'? available: count, names, scale"
    )
    for name in ("x", "path"):
        assert refused(call, no_options, **{name: 1}) == (
            f"some.options: unknown option {name!r}: available: none"
        )
    for function, options in [(required, {}), (required, {"count": 2}), (required_too, {})]:
        assert refused(call, function, **options) == "some.options.folder is missing"
    assert call(required, folder="b") == ("a", "b", 1)
    assert call(required_too, folder="b") == ("a", "b")
    assert call(every_option, anything={"a": [1]}) == {"anything": {"a": [1]}}
    for options, said in [
        ({"count": 0}, "count: expected greater than or equal to 1, received 0"),
        ({"count": True}, "count: expected a valid integer, received True"),
        ({"count": "1"}, "count: expected a valid integer, received '1'"),
        ({"scale": float("nan")}, "scale: expected a finite number, received nan"),
        ({"names": [1]}, "names.0: expected a valid string, received 1"),
    ]:
        assert refused(call, **options) == f"some.options.{said}"
    # An error inside the function is passed on unchanged.
    assert refused(call, names=["inner"]).startswith("inner: training.epochs")
    with pytest.raises(ValueError, match="unchanged"):
        call(names=["value"])


FLATTEN = KerasObject(name="Flatten")


def with_defaults(
    spec: str,
    count: int = 3,
    *,
    rate: Annotated[float, Field(gt=0)] = 1,
    sides: Annotated[tuple[int, ...], Field(strict=False)] = (1, 2),
    strict: tuple[int, ...] | None = (3,),
    untyped=[3, "a"],  # noqa: B006
    layers: "Annotated[tuple[KerasObject, ...], Field(strict=False)]" = (FLATTEN,),
    nothing: int | None = None,
    not_allowed: int = None,  # noqa: RUF013
    folder: Path = Path("x"),
    untyped_tuple=(3, "a"),
    untyped_folder=Path("x"),
    infinite: float = math.inf,
    function: Callable[[Any], Any] = str,
    holes: Any = (None, 1),
) -> dict[str, Any]:
    return {k: v for k, v in locals().items() if k != "spec"}


def test_the_defaults_of_a_function_are_recorded_as_options() -> None:
    """Those that are the same after they were written to TOML and read back."""
    given = ModelConfig(name="own", options={"count": 4})
    resolved = given.resolved(with_defaults)
    assert resolved.options == {
        "count": 4,
        "rate": 1.0,
        "sides": [1, 2],
        "strict": [3],
        "untyped": [3, "a"],
        "layers": [{"name": "Flatten", "options": {}}],
        "folder": "x",
    }
    assert resolved.unset_options == ["nothing"]
    read = parse_config(tomllib.loads(Config(model=resolved).to_toml()), origin="x").model
    assert read == resolved
    assert read.resolved(with_defaults) == resolved
    again = call_with_options(with_defaults, "a", options=read.arguments, where="x")
    assert again == with_defaults("a", 4)


def test_another_name_drops_the_options_of_the_old_name(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        '[model]\nname = "cnn"\noptions = { crop = 2 }\n'
        '[optimizer]\nname = "Adam"\noptions = { beta_1 = 0.7 }\n'
    )
    config = load_config(path, ["model.options.units=[8]", "model.name=mlp"])
    assert (config.model.name, config.model.options) == ("mlp", {"units": [8]})
    assert config.optimizer.options == {"beta_1": 0.7}
    assert load_config(path, ["optimizer.name=SGD"]).optimizer.options == {}
    assert load_config(path, ["model.name=cnn"]).model.options == {"crop": 2}
