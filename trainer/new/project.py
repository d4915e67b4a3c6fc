"""Creates a project: checks, copies files under a new name, formats them, commits them."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from trainer import __version__
from trainer.errors import InputError, expect, require_packages
from trainer.new.configuration import default_config
from trainer.new.names import check_name, rename
from trainer.new.removal import Removal, check_removable

ROOT = Path(__file__).resolve().parents[2]
# Variables that select a repository. Hooks of git have some of them.
_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR"}
_REPOSITORY |= {"GIT_OBJECT_DIRECTORY"}


def create_project(directory: Path, name: str, without: Collection[str], data: Path | None) -> str:
    """Creates a project in a new git repository with one commit.

    An interruption leaves no files: they are written to a temporary folder beside `directory`,
    which is renamed at the end.

    Args:
        directory: A folder that does not exist or is empty.
        name: The name of the package and of the command.
        without: The tools that are left out.
        data: A folder of images, a .csv or an .npz file; None: MNIST.

    Returns:
        The reason if there is no commit, and what to do; otherwise "".

    Raises:
        InputError: An argument is wrong, or this package is not in its repository.
        MissingError: ruff is not installed.
    """
    target = directory.resolve()
    _check(target)
    check_removable(without)
    require_packages("trainer new", ("ruff",), extra="dev")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as temporary:
        copy = Path(temporary) / "project"
        copy.mkdir()
        _git(copy, "init", "--quiet")
        files = _read_files(copy, data)
        check_name(name, files)
        config = default_config(ROOT / "configs", name, data, target)
        _write_files(copy, name, files, Removal([*without, "new"], files))
        (copy / "configs" / f"{name}.toml").write_text(config, encoding="utf-8")
        for words in (("check", "--fix", "--exit-zero"), ("format",)):  # for the length of the name
            command = [sys.executable, "-m", "ruff", *words, "--quiet", "--no-cache", "."]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            expect(done.returncode == 0, "ruff", "Python files without errors", done.stderr)
        hint = _commit(copy, f"{name}, created with trainer new {__version__}")
        copy.replace(target)
    return hint


def _check(target: Path) -> None:
    if not (ROOT / "docs" / "new.md").is_file():
        raise InputError("trainer new copies its repository: clone it, and use its `trainer new`")
    if shutil.which("git") is None:
        raise InputError("trainer new needs git: install it")
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    outside = target != Path.cwd() and not target.is_relative_to(ROOT)
    fits = empty and outside and target.parent.is_dir()
    expected = "a new or empty folder in an existing one, not this folder, not in the repository"
    expect(fits, "DIRECTORY", expected, f"'{target}'")


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in _REPOSITORY}
    command = ["git", *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def _read_files(copy: Path, data: Path | None) -> dict[str, str]:
    """Returns the files that git tracks or does not ignore, without `data`: paths and texts.

    The text of a file that is no text, a picture for example, can be encoded again.
    """
    # Without a checkout, the new repository, which is empty, lists the files that are not ignored.
    has_git = (ROOT / ".git").exists()
    options = [] if has_git else [f"--git-dir={copy}/.git", f"--work-tree={ROOT}"]
    listed = _git(ROOT, *options, "ls-files", "-z", "-co", "--exclude-standard")
    expect(listed.returncode == 0, str(ROOT), "a git checkout", listed.stderr.strip())
    names = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    if data is not None:  # the images are used where they are
        names = [name for name in names if not (ROOT / name).is_relative_to(data.resolve())]
    return {name: (ROOT / name).read_bytes().decode("utf-8", "surrogateescape") for name in names}


def _write_files(copy: Path, name: str, files: Mapping[str, str], removal: Removal) -> None:
    for file in files.keys() - removal.files:
        text = files[file]
        if file == "CHANGELOG.md":
            text = "# Changelog\n\n## Unreleased\n"
        elif file == "README.md":
            start = (Path(__file__).with_name("readme.txt")).read_text(encoding="utf-8")
            text = start + "".join(text.partition("\n## Verbs")[1:])
            template = r"^## (Results on MNIST|Compared with other starting points)\n.*?(?=^## )"
            text = re.sub(template, "", text, flags=re.M | re.S)
            text = re.sub(r"^Only these parts.*?\n\n", "", text, flags=re.M | re.S)
        elif file == "trainer/console.py":
            text = text.replace("configs/mnist.toml", f"configs/{name}.toml")
        elif file == "pyproject.toml" and len(name) > len("trainer"):
            rule = 'ignore = ["E501"]  # the name makes comments longer\n'
            text = text.replace("[tool.ruff.lint]\n", f"[tool.ruff.lint]\n{rule}")
        target = copy / rename(file, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if "\0" not in text:  # it is a text, by git's rule
            text = rename(removal.edit(file, text), name)
        target.write_bytes(text.encode("utf-8", "surrogateescape"))
        shutil.copymode(ROOT / file, target)


def _commit(copy: Path, message: str) -> str:
    """Commits all files. Returns a hint if git refuses, for example without an author."""
    _git(copy, "add", "--all", "--force")  # a user's own list of ignored files does not count
    done = _git(copy, "-c", "user.useConfigOnly=true", "commit", "--quiet", "-m", message)
    if done.returncode == 0:
        return ""
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"not committed ({reason}): set git's user.name and user.email, then run `git commit`"
