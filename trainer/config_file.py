"""Reads a configuration from a TOML file, the files that it extends, and `--set`."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import shipped_configs
from trainer.config import Config, parse_config, put_value
from trainer.errors import InputError, did_you_mean, expect


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Reads, changes and checks a configuration.

    Args:
        path: A TOML file. Its key `extends` names another file, whose tables it changes. If the
            file is missing, and has the name of a shipped configuration, for example
            "configs/mnist.toml", the shipped one is read.
        overrides: Changes as `"section.key=value"`, as `parse_override` reads them. Changing
            `model.name`, `data.name` or `optimizer.name` drops the file's options for the old name,
            and `model.freeze`.
        stored: As in `parse_config`.

    Raises:
        InputError: A file is missing or is not TOML, a key is unknown, or a value has the wrong
            type or is out of range.
    """
    return load_with_origins(path, overrides, stored=stored)[0]


def load_with_origins(
    path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False
) -> tuple[Config, dict[str, str]]:
    """Reads a configuration as `load_config` does, and the origin of each `section.key`.

    An origin is a file, "--set" or "default". A table can have several, separated by commas.
    """
    layers = _read_files(shipped_configs.find(Path(path)))
    tree: dict[str, Any] = {}
    for number, (origin, changes) in enumerate(layers, 1):
        _merge(tree, changes)
        if number < len(layers):
            parse_config(tree, origin=origin)  # a file that is extended must be valid itself
    given = [parse_override(override) for override in overrides]
    for key, value in given:
        table = tree.get(key.removesuffix(".name"))
        if isinstance(table, dict):
            _drop_options(table, value)
    layers.append(("--set", {}))
    for key, value in given:
        put_value(tree, key, value)
        put_value(layers[-1][1], key, value)
    origin = f"{path} and --set" if overrides else str(path)
    config = parse_config(tree, origin=origin, stored=stored)
    # The last layer that has a value sets it.
    origins = {key: origin for origin, changes in layers for key in flatten(changes)}
    found: dict[str, list[str]] = {}
    for key in flatten(tree):
        found.setdefault(".".join(key.split(".", 2)[:2]), []).append(origins[key])
    names = {name: dict.fromkeys(found.get(name, ["default"])) for name in config.flat()}
    return config, {name: ", ".join(each) for name, each in names.items()}


def add_origins(toml: str, origins: Mapping[str, str]) -> str:
    """Adds the origin of each value to the text of `Config.to_toml`, as a comment."""
    lines, section = [], ""
    for line in toml.splitlines():
        key, equals, _ = line.partition(" = ")
        section = line.strip("[]") if line.startswith("[") else section
        lines.append(f"{line:<60}  # {origins[f'{section}.{key}']}" if equals else line)
    return "\n".join([*lines, ""])


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `section.key=value` and reads the value as TOML.

    A word is read as a string, so `data.name=fashion_mnist` needs no quotes.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested tables by dotted key. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _read_files(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the names and tables of a file and of those that it extends, the base first."""
    chain: list[Path] = []
    layers: list[tuple[str, dict[str, Any]]] = []
    while True:
        tree = _read(path, chain)
        layers.insert(0, (str(path), tree))
        base = tree.pop("extends", None)
        if base is None:
            return layers
        usable = isinstance(base, str) and "\0" not in base
        expect(usable, f"{path}: extends", "the path of a TOML file", repr(base))
        chain, path = [*chain, path], shipped_configs.find(path.parent / base)
        if os.path.realpath(path) in map(os.path.realpath, chain):  # resolve() refuses some links
            text = " -> ".join(map(str, [*chain, path]))
            raise InputError(f"extends: expected no cycle, received {text}")


def _read(path: Path, extending: list[Path]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        files = {str(p) for folder in (path.parent, Path("configs")) for p in folder.glob("*.toml")}
        files |= shipped_configs.shipped().keys()
        if not extending:
            known = did_you_mean(str(path), files)
            raise InputError(f"there is no configuration file {path}: {known}") from None
        folder = extending[-1].parent  # the paths in a file are relative to its folder
        known = did_you_mean(
            os.path.relpath(path, folder), {os.path.relpath(file, folder) for file in files}
        )
        message = f"there is no configuration file {path}, which {extending[-1]} extends"
        raise InputError(f"{message}: {known}") from None
    except IsADirectoryError:
        message = f"expected a TOML file, received the folder {path}"
        raise InputError(
            f"{message}: `trainer fit configs/pictures.toml --set data.options.path=FOLDER` "
            "trains on a folder of images"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # some errors of tomllib are ValueErrors
        raise InputError(f"{path} cannot be read as TOML: {error}") from None


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Changes tables key by key. Another `name` drops the options for the old one."""
    if "name" in changes:
        _drop_options(tree, changes["name"])
    for key, value in changes.items():
        if isinstance(value, dict):
            below = tree.get(key)
            tree[key] = below if isinstance(below, dict) else {}
            _merge(tree[key], value)
        else:
            tree[key] = value


def _drop_options(table: dict[str, Any], name: Any) -> None:
    for key in ("options", "unset_options", "freeze") if name != table.get("name") else ():
        table.pop(key, None)
