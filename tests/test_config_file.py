"""Configurations that extend others, and the origin of each value."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config_file import load_config, load_with_origins
from trainer.errors import InputError
from trainer.run import Run

BASE = """
[data]
name = "folder"
options = { path = "pictures" }
[model]
name = "cnn"
options = { filters = [32, 64], dense = 128 }
[optimizer]
learning_rate = 0.01
options = { beta_1 = 0.7 }
schedule = { name = "CosineDecay", options = { alpha = 0.1 } }
[training]
epochs = 7
callbacks = ["TerminateOnNaN"]
"""
CHILD = """
extends = "../base.toml"
[model]
options = { filters = [8] }
[optimizer]
name = "SGD"
schedule = { name = "PolynomialDecay", options = { power = 2.0 } }
[training]
epochs = 2
callbacks = []
"""


@pytest.fixture
def files(in_tmp_path: Path) -> Callable[..., None]:
    """Writes TOML files by path."""

    def write(**contents: str) -> None:
        for name, content in contents.items():
            path = Path(f"{name.replace('__', '/')}.toml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")

    del in_tmp_path
    return write


def refused(*arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_config(*arguments)
    return str(caught.value)


def test_tables_are_merged_and_lists_replaced(files: Callable[..., None]) -> None:
    files(base=BASE, sub__child=CHILD, sub__last='extends = "child.toml"\ntraining.seed = 3')
    config = load_config("sub/last.toml")
    assert config.data.options == {"path": "pictures"}
    assert config.model.options == {"filters": [8], "dense": 128}
    assert (config.training.epochs, config.training.seed) == (2, 3)
    assert config.training.callbacks == []
    # Another name drops the options for the old one.
    assert (config.optimizer.name, config.optimizer.options) == ("SGD", {})
    assert config.optimizer.learning_rate == 0.01
    assert config.optimizer.schedule is not None
    assert config.optimizer.schedule.options == {"power": 2.0}
    assert load_config("base.toml").training.epochs == 7


def test_set_changes_the_merged_tables(files: Callable[..., None]) -> None:
    files(base=BASE, sub__child=CHILD)
    config = load_config("sub/child.toml", ["model.name=mlp", "training.epochs=5"])
    assert (config.model.options, config.training.epochs) == ({}, 5)
    config = load_config("sub/child.toml", ["model.name=cnn", "model.options.dense=4"])
    assert config.model.options == {"filters": [8], "dense": 4}


def test_the_origin_of_each_value(files: Callable[..., None]) -> None:
    files(base=BASE, sub__child=CHILD)
    overrides = ["model.options.crop=2", "optimizer.schedule={name='CosineDecay'}"]
    config, origins = load_with_origins("sub/child.toml", [*overrides, "training.seed=3"])
    base, child = "sub/../base.toml", "sub/child.toml"
    assert list(origins) == list(config.flat())
    assert {key: origin for key, origin in origins.items() if origin != "default"} == {
        "data.name": base,
        "data.options": base,
        "model.name": base,
        "model.options": f"{child}, {base}, --set",
        "optimizer.learning_rate": base,
        "optimizer.name": child,
        "optimizer.schedule": "--set",
        "training.epochs": child,
        "training.callbacks": child,
        "training.seed": "--set",
    }
    overrides.append("optimizer.schedule.options.alpha=0.5")
    config, origins = load_with_origins("sub/child.toml", overrides)
    assert config.optimizer.schedule is not None
    assert config.optimizer.schedule.options == {"alpha": 0.5}
    assert origins["optimizer.schedule"] == "--set"


def test_show_prints_the_origins(
    files: Callable[..., None], command: Callable[..., tuple[int, str, str]]
) -> None:
    files(base=BASE, sub__child=CHILD)
    arguments = ("config", "show", "sub/child.toml", "--set", "training.seed=3")
    code, out, _ = command(*arguments)
    assert code == 0
    comments = {line.partition(" = ")[0]: line.rpartition("  # ") for line in out.splitlines()}
    assert comments["epochs"][2] == "sub/child.toml"
    assert comments["seed"][2] == "--set"
    assert comments["batch_size"][2] == "default"
    assert len({len(comments[key][0]) for key in ("epochs", "seed", "batch_size")}) == 1
    shown = json.loads(command(*arguments, "--json")[1])
    assert shown["origins"]["training.epochs"] == "sub/child.toml"
    assert tomllib.loads(out)["training"]["seed"] == shown["training"]["seed"] == 3
    files(again=out)
    assert load_config("again.toml") == load_config("sub/child.toml", ["training.seed=3"])


def test_a_run_has_the_merged_configuration(files: Callable[..., None]) -> None:
    files(base=BASE, sub__child=CHILD)
    config = load_config("sub/child.toml")
    run = Run(Path("run"))
    run.begin(config)
    assert "extends" not in (run.path / "config.toml").read_text(encoding="utf-8")
    assert run.config() == config


def test_errors_name_the_file(files: Callable[..., None]) -> None:
    files(
        a='extends = "b.toml"',
        b='extends = "sub/c.toml"',
        sub__c='extends = "../a.toml"',
        itself='extends = "./itself.toml"',
        missing='extends = "sub/d.toml"',
        number="extends = 3",
        null=r'extends = "\u0000"',
        old="[training]\nsteps_per_call = 3",
        extends_old='extends = "old.toml"\ntraining.steps_per_execution = 4',
        wrong='extends = "base.toml"\ntraining.epochs = 0',
        base="training.epochs = 3",
    )
    cycle = "extends: expected no cycle, received a.toml -> b.toml -> sub/c.toml -> sub/../a.toml"
    assert refused("a.toml") == cycle
    assert "cycle, received itself.toml -> itself.toml" in refused("itself.toml")
    assert refused("missing.toml").startswith(
        "there is no configuration file sub/d.toml, which missing.toml extends: "
        "did you mean 'sub/c.toml'? available: configs/"
    )
    assert refused("number.toml") == (
        "number.toml: extends: expected the path of a TOML file, received 3"
    )
    assert refused("null.toml").endswith(r"expected the path of a TOML file, received '\x00'")
    assert refused("extends_old.toml") == (
        "old.toml: training.steps_per_call was renamed to training.steps_per_execution"
    )
    assert refused("wrong.toml", ["training.seed=1"]).startswith(
        "wrong.toml and --set: training.epochs: expected greater than or equal to 1"
    )


def test_a_shipped_configuration_can_be_extended_in_every_folder(
    files: Callable[..., None],
) -> None:
    files(mine='extends = "configs/mnist_mlp.toml"\ntraining.epochs = 7')
    config = load_config("mine.toml")
    assert (config.model.name, config.training.epochs) == ("mlp", 7)
