"""Writes constraints.txt again: the newest packages that pyproject.toml allows.

    python scripts/upgrade.py                             # within the bounds of pyproject.toml
    python scripts/upgrade.py tensorflow=2.22 keras=3.16  # moves the bounds of these packages first

Nothing is installed: pip only resolves the versions. Run it with the oldest supported Python,
because newer packages may not support it. `make upgrade` also installs the versions and runs the
tests.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_PROJECT = _ROOT / "pyproject.toml"
_CONSTRAINTS = _ROOT / "constraints.txt"
_NOT_TESTED = ("gpu",)  # extras whose packages need other hardware


def main(*moves: str) -> int:
    """Writes pyproject.toml and constraints.txt, prints the differences, returns the exit code."""
    text = _PROJECT.read_text(encoding="utf-8")
    try:
        for move in moves:
            text = move_bounds(text, move)
        versions = resolve(requirements(tomllib.loads(text)["project"]))
    except ValueError as error:
        print(f"upgrade: {error}", file=sys.stderr)
        return 2
    _PROJECT.write_text(text, encoding="utf-8")
    old = _CONSTRAINTS.read_text(encoding="utf-8")
    new = constraints(old, versions)
    _CONSTRAINTS.write_text(new, encoding="utf-8")
    before, after = set(old.splitlines()), set(new.splitlines())
    for line in sorted(before ^ after, key=str.lower):
        print("+" if line in after else "-", line)
    print(f"{len(versions)} packages, {len(after - before)} lines changed")
    return 0


def move_bounds(text: str, move: str) -> str:
    """Returns pyproject.toml with other bounds for a package: "keras=3.16" means >=3.16,<3.17."""
    match = re.fullmatch(r"([\w.-]+)=(\d+)\.(\d+)", move)
    if match is None:
        raise ValueError(f"expected PACKAGE=MAJOR.MINOR, for example keras=3.16; received {move!r}")
    name, major, minor = match[1], int(match[2]), int(match[3])
    bounds = f">={major}.{minor},<{major}.{minor + 1}"
    text, count = re.subn(
        rf'("{re.escape(name)}(?:\[[\w-]+\])?)>=[^"<]+,<[^"]+"', rf'\1{bounds}"', text
    )
    if not count:
        raise ValueError(f"pyproject.toml has no upper bound for {name!r}")
    return text


def requirements(project: dict[str, Any]) -> list[str]:
    """Returns the requirements of the package and of all extras that are tested."""
    extras = project["optional-dependencies"].items()
    optional = [each for name, extra in extras if name not in _NOT_TESTED for each in extra]
    own = f"{project['name']}["
    return [*project["dependencies"], *(each for each in optional if not each.startswith(own))]


def resolve(required: list[str]) -> dict[str, str]:
    """Returns the version of each package that pip would install in an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--report", "-", *required]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip finds no versions: {done.stderr.strip()}")
    packages = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    return {package["name"]: package["version"] for package in packages}


def constraints(old: str, versions: dict[str, str]) -> str:
    """Returns constraints.txt with other versions. Its comments stay."""
    comments = [line for line in old.splitlines() if line.startswith("#")]
    pins = [f"{name}=={version}" for name, version in versions.items()]
    return "\n".join([*comments, *sorted(pins, key=str.lower), ""])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
