"""Refuses private names of other libraries outside the modules that collect them.

A private name can change in any release. The modules `*_internals.py` collect those that have no
public alternative, each with its reason, and a test names the use that an upgrade breaks. All other
files of `trainer` and `scripts` are checked here: attributes, imports, keyword arguments, and names
in strings. `make check` runs this. `--list` prints the names that the modules `*_internals.py` use.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Packages whose documentation does not mention them, although no name begins with "_".
_PRIVATE = (
    *("keras.src", "keras_tuner.src", "tensorflow.python"),
    *("tensorboard", "uvicorn.protocols"),
)
# Exceptions that the libraries document.
_DOCUMENTED = (
    *("os._exit", "tensorboard.program", "tensorboard.summary", "tensorboard.notebook"),
    *("tensorboard.plugins.hparams.api", "tensorboard.plugins.custom_scalar"),
)
_ATTRIBUTE_FUNCTIONS = {"getattr", "hasattr", "setattr", "delattr"}


def main(*folders: str, internals: bool = False) -> int:
    """Prints every use of a private name, and returns the exit code.

    Args:
        folders: Folders to check; imports between them are allowed.
        internals: Only list the names that the modules `*_internals.py` use.
    """
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"), str(path))
        for folder in folders
        for path in sorted(Path(folder).rglob("*.py"))
    }
    own_modules = {Path(folder).resolve().name for folder in folders} | {p.stem for p in trees}
    defined = {path: set(_definitions(tree)) for path, tree in trees.items()}
    everywhere = set().union(*defined.values())
    count = 0
    for path, tree in trees.items():
        allowed = path.stem.endswith("_internals")
        if allowed == internals and path.resolve() != Path(__file__).resolve():
            for line, name in _Checker(own_modules, defined[path], everywhere).uses(tree):
                count += 1
                print(f"{path}:{line}: {name} is private in another library")
    if internals:
        return 0
    if count:
        print(f"{count} private names: use public ones, or move them to a module *_internals.py")
    return int(count > 0)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _definitions(tree: ast.AST) -> Iterator[str]:
    """Yields the names that a module defines: functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


class _Checker:
    """Finds the private names of other libraries in one module."""

    def __init__(self, own_modules: set[str], here: set[str], everywhere: set[str]) -> None:
        """Takes the project's modules, and the names that this module and all of them define."""
        self._own_modules, self._here, self._everywhere = own_modules, here, everywhere
        self._imports: dict[str, str] = {}  # from each local name to its full name

    def uses(self, tree: ast.AST) -> Iterator[tuple[int, str]]:
        """Yields line and name of each use."""
        for node in ast.walk(tree):  # imports first: they explain the names of the other nodes
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in self._imported(node):
                    if self._is_refused(name):
                        yield node.lineno, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and self._is_refused_in(node.value, node.attr):
                yield node.lineno, ast.unparse(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"\w+(\.\w+)+", node.value) and _is_private_module(node.value):
                    yield node.lineno, repr(node.value)
            elif isinstance(node, ast.Call):
                yield from self._arguments(node)

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            full = prefix + alias.name
            local = alias.asname or (alias.name if prefix else full.partition(".")[0])
            self._imports[local] = full if prefix or alias.asname else local
            yield full

    def _is_refused(self, full: str) -> bool:
        """Returns whether a full name, for example "keras.src.ops", is refused."""
        if full.partition(".")[0] in self._own_modules or _is_inside(full, _DOCUMENTED):
            return False
        return _is_private_module(full) or any(map(_is_private, full.split(".")))

    def _is_refused_in(self, value: ast.expr, name: str) -> bool:
        """Returns whether the attribute `name` of an expression is refused."""
        root, *rest = ast.unparse(value).split(".")
        if root in self._imports:
            base = ".".join([self._imports[root], *rest])
            return self._is_refused(f"{base}.{name}") and not self._is_refused(base)
        own = self._everywhere if root in ("self", "cls", "super()") else self._here
        return _is_private(name) and name not in own

    def _arguments(self, node: ast.Call) -> Iterator[tuple[int, str]]:
        if ast.unparse(node.func) in _ATTRIBUTE_FUNCTIONS and len(node.args) > 1:
            value, name = node.args[:2]
            if isinstance(name, ast.Constant) and self._is_refused_in(value, str(name.value)):
                yield node.lineno, ast.unparse(node)
        for keyword in node.keywords:
            if keyword.arg and _is_private(keyword.arg):
                yield node.lineno, f"{keyword.arg}="


def _is_private_module(name: str) -> bool:
    return _is_inside(name, _PRIVATE) and not _is_inside(name, _DOCUMENTED)


def _is_inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--list"]
    sys.exit(main(*(arguments or ("trainer", "scripts")), internals="--list" in sys.argv))
