"""Finds the tools: the folders of this package that have a cli.py.

The core imports no tool. This module finds the verbs, the functions and the configuration tables of
the tools. So deleting the folder of a tool removes all of them.

A tool's folder has:
    __init__.py    PUBLIC: the functions that `trainer.NAME` offers, with the module of each
    cli.py         app: a typer.Typer with the tool's verbs; it imports nothing heavy
    config.py      optional. TABLE: the class of the tool's table; RENAMED: old keys to new keys
"""

import importlib
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of the tools, sorted."""
    return sorted(path.parent.name for path in _PACKAGE.glob("*/cli.py"))


def apps() -> list[Any]:
    """Returns the typer application of each tool."""
    return [importlib.import_module(f"trainer.{name}.cli").app for name in names()]


def functions() -> dict[str, str]:
    """Returns the public functions of the tools, with the module that defines each."""
    found: dict[str, str] = {}
    for name in names():
        found |= importlib.import_module(f"trainer.{name}").PUBLIC
    return found


def config_modules() -> dict[str, Any]:
    """Returns the module of each tool that has a table in the configuration, by table name."""
    return {
        name: importlib.import_module(f"trainer.{name}.config")
        for name in names()
        if (_PACKAGE / name / "config.py").exists()
    }
