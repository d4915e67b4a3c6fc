"""The shipped configurations: configs/ of the repository, or trainer/configs of a wheel.

So `trainer fit configs/mnist.toml` also works in a folder without a folder configs/.
"""

import itertools
from pathlib import Path

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def shipped() -> dict[str, Path]:
    """Returns the path of each shipped configuration, by its name "configs/<file>"."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {f"configs/{path.name}": path for path in sorted(folder.glob("*.toml"))}


def find(path: Path) -> Path:
    """Returns the path of a file, or of the shipped configuration of that name if it is missing."""
    return path if path.exists() else shipped().get(path.as_posix(), path)


def describe(path: Path) -> str:
    """Returns the first sentence of the comment at the start of a configuration file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0]
