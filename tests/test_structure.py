"""The structure of the package: small functions, a small core, and tools that can be deleted."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import trainer
from trainer import tools

ROOT = Path(__file__).parents[1]
# From each tool to one of its verbs.
VERBS = {
    "benchmark": "benchmark",
    "doctor": "doctor",
    "gradient": "gradient",
    "new": "new",
    "runs": "runs",
    "saving": "save",
    "serving": "serve",
    "tuning": "tune",
}
TOOLS = {name: verb for name, verb in VERBS.items() if name in tools.names()}
# A tool that imports another one is removed together with it.
REMOVED_WITH = {"saving": ["serving"]}
# The sizes on the day of this test. Lower them with each change that removes code.
MAX_LINES = 14_582
MAX_CORE_LINES = 4_642
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
of_the_template = pytest.mark.skipif(
    "new" not in tools.names(), reason="a project of a user may grow, and its name may be longer"
)


def line_count(paths: Sequence[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def modules() -> list[Path]:
    return sorted((ROOT / "trainer").rglob("*.py"))


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.relative_to(ROOT), node


@of_the_template
def test_the_package_stays_small() -> None:
    folders: dict[str, list[Path]] = {}
    for path in modules():
        folders.setdefault(str(path.parent.relative_to(ROOT)), []).append(path)
    lines = {folder: line_count(paths) for folder, paths in folders.items()}
    assert sum(lines.values()) <= MAX_LINES, lines


@of_the_template
def test_a_training_loads_few_modules() -> None:
    program = (
        "import sys, trainer.workflow\n"
        "for name, module in sys.modules.items():\n"
        "    if name.partition('.')[0] == 'trainer':\n"
        "        print(module.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [Path(line) for line in done.stdout.splitlines()]
    lines = {str(path.relative_to(ROOT)): line_count([path]) for path in loaded}
    assert sum(lines.values()) <= MAX_CORE_LINES, lines


def test_functions_are_short() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}: {lines} lines"
        for path, node in functions()
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_only_entry_points_have_many_parameters() -> None:
    found = []
    for path, node in functions():
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        public = node.name in trainer.__all__ or path.name == "cli.py"
        public |= node.name == "train_step" or (path.name == "loop.py" and node.name == "__init__")
        # The options of a configuration are the parameters of these functions.
        public |= (path.parent.name, node.name) in (("models", "build"), ("data", "load"))
        if len(names) > MAX_PARAMETERS and not public:
            found.append(f"{path}:{node.lineno} {node.name}: {len(names)} parameters")
    assert not found, "\n".join(found)


class Checkout:
    """A copy of the repository, in which commands run with the present packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(folder)}
        self.environment.pop("PYTEST_ADDOPTS", None)

    @classmethod
    def without(cls, removed: Sequence[str], folder: Path) -> "Checkout":
        """Copies the repository without the folders of some tools."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if listed.returncode:
            pytest.skip("this is no git checkout")
        parts = {f"{parent}/{tool}/" for tool in removed for parent in ("trainer", "tests")}
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith(tuple(parts)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        return cls(folder)

    def run(self, *words: str, code: int = 0) -> str:
        """Runs a command, and returns stdout and stderr."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == code, f"{' '.join(words)}: {done.stdout[-4000:]}"
        return done.stdout

    def trainer(self, *words: str, code: int = 0) -> str:
        return self.run(sys.executable, "-m", "trainer", *words, code=code)

    def make_check(self, *, only: str = "") -> None:
        """Runs the commands of `make check` in the present environment."""
        recipe = re.search(
            r"^check:.*\n((?:\t.*\n)+)", (self.folder / "Makefile").read_text(), re.M
        )
        assert recipe is not None
        commands = recipe[1].replace("$(BIN)", str(Path(sys.executable).parent)).splitlines()
        for command in commands:
            if only in command:
                self.run(*command.split())

    def check_removed(self, tools: Sequence[str]) -> None:
        """Checks help, unknown verbs, and the collection of all tests."""
        text = self.trainer("--help")
        assert re.search(r"\bfit\b", text)
        for tool in tools:
            assert not re.search(rf"^\W*{VERBS[tool]}\b", text, re.MULTILINE)
            assert "No such command" in self.trainer(VERBS[tool], code=2)
        collected = self.run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0")
        assert re.search(r"\d+/\d+ tests collected", collected)


@pytest.mark.slow
def test_the_core_works_alone(tmp_path: Path) -> None:
    removed = ["benchmark", "gradient", "serving", "tuning"]
    checkout = Checkout.without(removed, tmp_path)
    checkout.check_removed(removed)
    checkout.make_check()
    checkout.trainer("fit", "configs/debug.toml", "--epochs", "1")


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_can_be_removed(tool: str, tmp_path: Path) -> None:
    removed = [tool, *REMOVED_WITH.get(tool, [])]
    checkout = Checkout.without(removed, tmp_path)
    checkout.check_removed(removed)
    checkout.make_check(only="lint-imports")
