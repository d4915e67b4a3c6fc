"""scripts/upgrade.py, and constraints.txt as it writes it."""

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from upgrade import constraints, main, move_bounds, requirements

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_constraints_have_a_version_of_each_requirement() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): pin for name, _, pin in (s.partition("==") for s in lines)}
    for each in map(Requirement, requirements(tomllib.loads(PROJECT)["project"])):
        assert pins[canonicalize_name(each.name)] in each.specifier, each
    assert constraints(CONSTRAINTS, dict(line.split("==") for line in lines)) == CONSTRAINTS


def test_bounds_are_moved_in_all_extras() -> None:
    moved = move_bounds(move_bounds(PROJECT, "tensorflow=2.22"), "keras=4.0")
    project = tomllib.loads(moved)["project"]
    assert {"tensorflow>=2.22,<2.23", "keras>=4.0,<4.1"} < set(project["dependencies"])
    assert "tensorboard>=2.20" in project["dependencies"]
    assert project["optional-dependencies"]["gpu"] == ["tensorflow[and-cuda]>=2.22,<2.23"]


@pytest.mark.parametrize(
    ("move", "message"),
    [
        ("keras", "expected PACKAGE=MAJOR.MINOR, for example keras=3.16; received 'keras'"),
        ("keras=4", "received 'keras=4'"),
        ("numpy=2.5", "pyproject.toml has no upper bound for 'numpy'"),
    ],
)
def test_wrong_moves_are_refused(
    move: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(move) == 2
    assert message in capsys.readouterr().err
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8") == PROJECT
