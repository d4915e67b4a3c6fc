"""Reads a configuration from a TOML file, the files that it extends, and `--set`."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import Config, parse_config, put_value
from trainer.errors import InputError, did_you_mean, expect

_COMMENT_COLUMN = 60  # longer lines have their comment at their end


def load_config(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Reads, changes and checks a configuration.

    Args:
        path: A TOML file. A key `extends` names a file whose tables it changes, key by key.
        overrides: Changes as `"section.key=value"`, as `parse_override` reads them. Changing
            `model.name`, `data.name` or `optimizer.name` drops the file's options for the old name.
        stored: As in `parse_config`.

    Raises:
        InputError: A file is missing or is not TOML, a key is unknown, or a value has the wrong
            type or is out of range.
    """
    return load_with_origins(path, overrides, stored=stored)[0]


def load_with_origins(
    path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False
) -> tuple[Config, dict[str, str]]:
    """Reads a configuration as `load_config` does, and the origin of each of its values.

    Returns:
        The configuration, and for each `section.key` the file that sets it, "--set" or "default". A
        table can have several origins, separated by commas.
    """
    tree, origins = _read(Path(path))
    given = [parse_override(override) for override in overrides]
    for key, value in given:
        section = key.removesuffix(".name")
        if isinstance(tree.get(section), dict):
            _drop_options(tree[section], origins[section], value)
    for key, value in given:
        put_value(tree, key, value)
        put_value(origins, key, _set_origin(value, "--set"))
    origin = f"{path} and --set" if overrides else str(path)
    config = parse_config(tree, origin=origin, stored=stored)
    found = {name: dict.fromkeys(_leaves(origins, *name.split("."))) for name in config.flat()}
    return config, {name: ", ".join(each) or "default" for name, each in found.items()}


def add_origins(toml: str, origins: Mapping[str, str]) -> str:
    """Adds the origin of each value to the text of `Config.to_toml`, as a comment."""
    lines, section = [], ""
    for line in toml.splitlines():
        key, equals, _ = line.partition(" = ")
        section = line.strip("[]") if line.startswith("[") else section
        comment = f"  # {origins[f'{section}.{key}']}" if equals else ""
        lines.append(f"{line:<{_COMMENT_COLUMN}}{comment}" if comment else line)
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


def _read(path: Path, extending: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file and the files that it extends.

    Args:
        path: The file.
        extending: The files that extend it, the first one that was read first.

    Returns:
        The merged tables, and tables of the same structure with the file of each value.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        files = {str(p) for folder in (path.parent, Path("configs")) for p in folder.glob("*.toml")}
        by = f", which {extending[-1]} extends" if extending else ""
        known = did_you_mean(str(path), files)
        raise InputError(f"there is no configuration file {path}{by}: {known}") from None
    except (OSError, ValueError, RecursionError) as error:  # some errors of tomllib are ValueErrors
        raise InputError(f"{path} cannot be read as TOML: {error}") from None
    name, chain = tree.pop("extends", None), (*extending, path)
    if name is None:
        return tree, _set_origin(tree, str(path))
    expect(isinstance(name, str), f"{path}: extends", "the path of a TOML file", repr(name))
    base = path.parent / name
    if base.resolve() in [each.resolve() for each in chain]:
        raise InputError(f"extends must not form a cycle: {' -> '.join(map(str, (*chain, base)))}")
    merged, origins = _read(base, chain)
    parse_config(merged, origin=str(base))  # an error in it names this file
    _merge(merged, origins, tree, str(path))
    return merged, origins


def _merge(
    tree: dict[str, Any], origins: dict[str, Any], changes: dict[str, Any], origin: str
) -> None:
    """Changes tables key by key. Another `name` drops the options for the old one."""
    if "name" in changes:
        _drop_options(tree, origins, changes["name"])
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], origins[key], value, origin)
        else:
            tree[key], origins[key] = value, _set_origin(value, origin)


def _drop_options(table: dict[str, Any], origins: dict[str, Any], name: Any) -> None:
    for key in ("options", "unset_options") if name != table.get("name") else ():
        table.pop(key, None)
        origins.pop(key, None)


def _set_origin(value: Any, origin: str) -> Any:
    """Returns the origin for each value of nested tables, in the same structure."""
    if isinstance(value, dict):
        return {key: _set_origin(each, origin) for key, each in value.items()}
    return origin


def _leaves(origins: Any, *keys: str) -> Iterator[str]:
    """Yields the origins of all values below a key."""
    for key in keys:
        origins = origins.get(key, {})
    if isinstance(origins, dict):
        for each in origins.values():
            yield from _leaves(each)
    else:
        yield origins
