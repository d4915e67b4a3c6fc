"""Errors that the user can fix, with their exit codes.

Errors in the user's own code are among them. Every other exception is a defect of this package: the
command prints its traceback, and the exit code is 1.
"""

import difflib
import importlib.util
import itertools
import re
import shlex
import signal
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
# A line of a traceback, as AutoGraph and TensorFlow write it into the messages of their errors.
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
# What they and Keras write before the last paragraph of a message, and after it.
_BEFORE = re.compile(r"Exception encountered when calling|Graph execution error|in user code:")
_AFTER = re.compile(
    r"\n\nArguments received by|\nTraceback \(most recent call last\):|\s\[\[| \[Op:"
)


class TrainerError(Exception):
    """An error that the user can fix. Its message is one line.

    The message states what was expected, what was received and what is available.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Joins the lines of the message and removes ANSI color codes, which libraries write."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()
        super().__init__(" ".join(line.strip() for line in lines if line.strip()))


class InputError(TrainerError):
    """Wrong usage, configuration or input."""

    exit_code = 2


class MissingError(TrainerError):
    """The requested device or optional component is missing."""

    exit_code = 3


class CheckError(TrainerError):
    """A check failed: the loss is not finite, or the output is on the wrong device."""

    exit_code = 4


class StoppedError(TrainerError):
    """A signal stopped the training; its state is saved."""

    def __init__(self, number: int, advice: str) -> None:
        """Builds the message from the number of the signal and how to continue."""
        cause = "control-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {cause}; {advice}")
        self.exit_code = 128 + number


def expect(fits: object, where: str, expected: object, received: object) -> None:
    """Raises an InputError "where: expected ..., received ..." unless `fits` is true."""
    if not fits:
        raise InputError(f"{where}: expected {expected}, received {received}")


def explain_user_code(error: BaseException) -> str | None:
    """Returns one line about an error that was raised in the user's code.

    The user's code is the modules that users add to `trainer/data` and `trainer/models`, and every
    file outside this package, the standard library and the installed packages.

    Args:
        error: Raised by a function that this package called.

    Returns:
        Its type and message, and the innermost line of the user's code; None if there is none.
    """
    stack = [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        stack.append((str(error.filename), error.lineno, "<module>"))
    written: Iterable[Any] = _FRAME.findall(str(error))
    if "Detected at node" in str(error):  # these frames begin with the program that called us
        written = itertools.dropwhile(lambda f: _PACKAGE not in Path(f[0]).parents, written)
    frames = [frame for frame in (*stack, *written) if _is_user_file(Path(frame[0]).resolve())]
    if not frames:
        return None
    file, line, function = frames[-1]
    name, file = type(error).__name__, file.removeprefix(f"{Path.cwd()}/")
    return f"{name}: {reason(error).removeprefix(f'{name}: ')} ({file}:{line}, in {function})"


def reason(error: BaseException) -> str:
    """Returns the message of an error without the text of Keras and TensorFlow around it."""
    text = _AFTER.split(re.sub(r"\{\{.*?\}\} ?", "", str(error)), maxsplit=1)[0].strip()
    if _BEFORE.match(text):
        text = re.split(r"\n\n|<stack traces unavailable>", text)[-1]
    return " ".join(text.split())[:1000]


def _is_user_file(path: Path) -> bool:
    if path.is_relative_to(_PACKAGE):
        ours = path.stem.startswith("_") or path.stem in ("application", "layers", "tfds")
        return path.parent.name in ("data", "models") and not ours
    generated = not path.is_file() or path.name.startswith("__autograph_generated_file")
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (generated or installed or path.is_relative_to(_STANDARD_LIBRARY))


def require_packages(feature: str, packages: Iterable[str], *, extra: str) -> None:
    """Raises MissingError if a module that a feature needs is not installed.

    The message names the extra of this package that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"{feature} needs {', '.join(missing)}: {install_command(extra)}")


def install_command(extra: str = "", *, options: str = "") -> str:
    """Returns the command that installs this package as it is installed now.

    For example `pip install -e '.[gpu]'` in a checkout, `pip install 'trainer[gpu]'` for a wheel.
    """
    checkout = (_PACKAGE.parent / "pyproject.toml").is_file()
    name = "." if checkout else "trainer"
    target = f"'{name}[{extra}]'" if extra else name
    return " ".join(filter(None, ["pip install", options, "-e" if checkout else "", target]))


def shell_command(*words: str | Path) -> str:
    """Returns a `trainer` command for users to copy, quoted for the shell."""
    return shlex.join(["trainer", *map(str, words)])


def did_you_mean(name: str, known: Iterable[str], *, shown: int = 12) -> str:
    """Lists the known names for an unknown one, and asks whether the most similar one was meant.

    For example "did you mean 'epochs'? available: batch_size, epochs". At most `shown` are listed.
    """
    names = sorted(known)
    lower = {n.lower(): n for n in reversed(names)}
    close = [lower[c] for c in difflib.get_close_matches(name.lower(), lower, n=1)]
    listed = ", ".join(names[:shown]) or "none"
    listed += f", … ({len(names)} in all)" if len(names) > shown else ""
    return "".join(f"did you mean {c!r}? " for c in close) + f"available: {listed}"
