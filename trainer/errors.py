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

_PACKAGE = Path(__file__).resolve().parent
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
# Modules of this project in the folders to which users add their own modules.
_OUR_MODULES = {
    "data": ("__init__", "_prepared", "mnist_sample", "synthetic", "tfds"),
    "models": ("__init__", "cnn", "layers", "mlp"),
}
# A line of a traceback, as TensorFlow writes it into the messages of its errors.
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
# The part of such a message that lists the definitions of the operation that failed.
_DEFINITIONS = re.compile(
    r'Graph execution error:\s+(Detected at node [^\n]+\s+(File "[^\n]+\s+)*)+', re.DOTALL
)
_Frame = tuple[str, int, str]  # file, line, function


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
    frames = [frame for frame in _frames(error) if _is_user_file(frame[0])]
    if not frames:
        return None
    file, line, function = frames[-1]
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    name = type(error).__name__
    return f"{name}: {_reason(error).removeprefix(f'{name}: ')} ({path}:{line}, in {function})"


def _frames(error: BaseException) -> list[_Frame]:
    """Returns the calls from this package to the error, the innermost last."""
    stack = traceback.extract_tb(error.__traceback__)
    frames = _below_package([(call.filename, call.lineno or 0, call.name) for call in stack])
    if isinstance(error, SyntaxError) and error.filename is not None:
        frames.append((error.filename, error.lineno or 0, "<module>"))
    message = str(error)
    written = [(match[1], int(match[2]), match[3]) for match in _FRAME.finditer(message)]
    if "in user code:" in message:  # AutoGraph lists only the functions that it has converted
        frames += written
    elif any(kind.__name__ == "OpError" for kind in type(error).__mro__):
        frames += _below_package(written)  # the definition of the operation that failed
    return frames


def _below_package(frames: list[_Frame]) -> list[_Frame]:
    """Removes the calls before the first call of this package, such as calls of a user's script."""
    return [*itertools.dropwhile(lambda f: _PACKAGE not in Path(f[0]).resolve().parents, frames)]


def _is_user_file(file: str) -> bool:
    path = Path(file).resolve()
    if path.is_relative_to(_PACKAGE):
        folder = path.parent.relative_to(_PACKAGE).as_posix()
        return folder in _OUR_MODULES and path.stem not in _OUR_MODULES[folder]
    generated = file.startswith("<") or path.name.startswith("__autograph_generated_file")
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (generated or installed or path.is_relative_to(_STANDARD_LIBRARY))


def _reason(error: BaseException) -> str:
    """Returns the user's message without the text that Keras and TensorFlow write around it."""
    text = str(error)
    # Keras: "Exception encountered when calling L.call(). <bold>the message</bold> Arguments ...".
    within = re.search(r"\x1b\[1m(.*)\x1b\[0m", text, re.DOTALL)
    if within and text.startswith("Exception encountered when calling"):
        text = within[1]
    text = text.rpartition("Error encountered:\n\n")[2]
    if "in user code:" in text:
        text = text.rstrip().rpartition("\n\n")[2]
    text = _DEFINITIONS.sub("", text)
    text = re.split(r"\nTraceback \(most recent call last\):|\n\t \[\[", text, maxsplit=1)[0]
    return " ".join(text.split())[:1000]


def require_packages(feature: str, packages: Iterable[str], *, extra: str) -> None:
    """Fails if a package that a feature needs is not installed.

    Args:
        feature: The name of the feature, for the message.
        packages: Names of modules.
        extra: The extra of this package that installs them.

    Raises:
        MissingError: A package is not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"{feature} needs {', '.join(missing)}: {install_command(extra)}")


def install_command(extra: str = "", *, options: str = "") -> str:
    """Returns the command that installs this package as it is installed now.

    Args:
        extra: Optional dependencies to install with it.
        options: Options of `pip install`.

    Returns:
        For example `pip install -e '.[gpu]'`, to be run in the checkout, or
        `pip install 'trainer[gpu]'` for an installed wheel.
    """
    checkout = (_PACKAGE.parent / "pyproject.toml").is_file()
    name = "." if checkout else "trainer"
    target = f"'{name}[{extra}]'" if extra else name
    return " ".join(filter(None, ["pip install", options, "-e" if checkout else "", target]))


def shell_command(*words: str | Path) -> str:
    """Returns a `trainer` command for users to copy, quoted for the shell.

    Args:
        words: The verb, its arguments and options. Files and folders are paths.
    """
    # The shell would read a path that begins with "-" as an option.
    texts = [
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    ]
    return shlex.join(["trainer", *texts])


def did_you_mean(name: str, known: Iterable[str], *, shown: int = 12) -> str:
    """Lists the known names for an unknown one, with the most similar name first.

    Args:
        name: The unknown name.
        known: All known names.
        shown: Maximum number of names to list.

    Returns:
        For example `"did you mean 'epochs'? available: batch_size, epochs"`.
    """
    names = sorted(known)
    lower = {n.lower(): n for n in reversed(names)}
    close = [lower[c] for c in difflib.get_close_matches(name.lower(), lower, n=1)]
    listed = ", ".join(names[:shown]) or "none"
    listed += f", … ({len(names)} in all)" if len(names) > shown else ""
    return "".join(f"did you mean {c!r}? " for c in close) + f"available: {listed}"
