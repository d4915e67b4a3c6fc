"""The errors a person can cause or mend, each with the exit code that the command ends with.

An error in code of the user is one of them. Everything else that goes wrong is a defect: it keeps
its traceback and ends with exit code 1.
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
# Users add modules of their own to these folders of the package; these are not theirs.
_OUR_MODULES = {
    "data": ("__init__", "_prepared", "mnist_sample", "synthetic", "tfds"),
    "models": ("__init__", "cnn", "layers", "mlp"),
}
# A line of a traceback, as TensorFlow writes it into the messages of its errors.
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)')
_DEFINITIONS = re.compile(
    r'Graph execution error:\s+(Detected at node [^\n]+\s+(File "[^\n]+\s+)*)+', re.DOTALL
)
_Frame = tuple[str, int, str]  # file, line, function


class TrainerError(Exception):
    """Something a person can mend; its message is the one line they read.

    The message states what was expected, what was received and what is available.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Puts the message on one line: the reasons of libraries come on several, and in colour."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()
        super().__init__(" ".join(line.strip() for line in lines if line.strip()))


class InputError(TrainerError):
    """Wrong usage, configuration or input."""

    exit_code = 2


class MissingError(TrainerError):
    """The device or the optional component that was asked for is not here."""

    exit_code = 3


class CheckError(TrainerError):
    """A check failed: the loss is not finite, or the output is not where it should be."""

    exit_code = 4


class StoppedError(TrainerError):
    """A signal ended the training; its state is saved."""

    def __init__(self, number: int, advice: str) -> None:
        """Names the signal, and how to go on."""
        cause = "control-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {cause}; {advice}")
        self.exit_code = 128 + number


def expect(fits: object, where: str, expected: object, received: object) -> None:
    """Raises an InputError "where: expected ..., received ..." unless `fits` is true."""
    if not fits:
        raise InputError(f"{where}: expected {expected}, received {received}")


def explain_user_code(error: BaseException) -> str | None:
    """Returns one line for an error that was raised in code of the user.

    Code of the user is every file that belongs neither to this package, nor to the standard
    library, nor to an installed package; and the modules that users add to `trainer/data` and
    `trainer/models`.

    Args:
        error: Raised below a function of this package.

    Returns:
        Its type and message, and the innermost line of the user's code; None if none was involved.
    """
    frames = [frame for frame in _frames(error) if _is_users(frame[0])]
    if not frames:
        return None
    file, line, function = frames[-1]
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    name = type(error).__name__
    return f"{name}: {_reason(error).removeprefix(f'{name}: ')} ({path}:{line}, in {function})"


def _frames(error: BaseException) -> list[_Frame]:
    """Returns the calls that led from this package to an error, the innermost last."""
    found = [
        (summary.filename, summary.lineno or 0, summary.name)
        for summary in traceback.extract_tb(error.__traceback__)
    ]
    frames = _below_package(found)
    if isinstance(error, SyntaxError) and error.filename is not None:
        frames.append((error.filename, error.lineno or 0, "<module>"))
    message = str(error)
    written = [(match[1], int(match[2]), match[3]) for match in _FRAME.finditer(message)]
    if "in user code:" in message:  # AutoGraph lists only what it has converted
        frames += written
    elif "OpError" in {kind.__name__ for kind in type(error).__mro__}:
        frames += _below_package(written)  # where the operation that failed was defined
    return frames


def _below_package(frames: list[_Frame]) -> list[_Frame]:
    """Leaves out the calls before the first one of this package: a script that calls it."""
    return list(itertools.dropwhile(lambda frame: not _in_package(frame[0]), frames))


def _in_package(file: str) -> bool:
    return Path(file).resolve().is_relative_to(_PACKAGE)


def _is_users(file: str) -> bool:
    path = Path(file).resolve()
    if path.is_relative_to(_PACKAGE):
        folder = path.parent.relative_to(_PACKAGE).as_posix()
        return folder in _OUR_MODULES and path.stem not in _OUR_MODULES[folder]
    generated = file.startswith("<") or path.name.startswith("__autograph_generated_file")
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (generated or installed or path.is_relative_to(_STANDARD_LIBRARY))


def _reason(error: BaseException) -> str:
    """Returns the message that the user wrote, without what Keras and TensorFlow put around it."""
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


def require_packages(what: str, packages: Iterable[str], *, extra: str) -> None:
    """Refuses what needs packages that are not installed.

    Args:
        what: Needs them.
        packages: Names of modules.
        extra: Of this package; brings them.

    Raises:
        MissingError: One cannot be imported.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"{what} needs {', '.join(missing)}: {install_command(extra)}")


def install_command(extra: str = "", *, options: str = "") -> str:
    """Returns the command that installs this package the way it is installed.

    Args:
        extra: Optional dependencies to install with it.
        options: Of `pip install`.

    Returns:
        For example `pip install -e '.[gpu]'` for a package that is imported from a checkout, where
        the command is to be run, and `pip install 'trainer[gpu]'` for an installed wheel.
    """
    checkout = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    name = "." if checkout else "trainer"
    words = [
        "pip install",
        options,
        "-e" if checkout else "",
        f"'{name}[{extra}]'" if extra else name,
    ]
    return " ".join(filter(None, words))


def shell_command(*words: str | Path) -> str:
    """Returns a `trainer` command for people to copy, quoted for the shell.

    Args:
        words: The verb, its arguments and options. Files and folders are paths.
    """
    # A path that begins with "-" would be read as an option.
    texts = [
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in words
    ]
    return shlex.join(["trainer", *texts])


def did_you_mean(name: str, known: Iterable[str], *, shown: int = 12) -> str:
    """Says what there is instead of an unknown name.

    Args:
        name: What was received.
        known: Every name that would have been accepted.
        shown: The most names to list.

    Returns:
        For example `"did you mean 'epochs'? available: batch_size, epochs"`.
    """
    names = sorted(known)
    lower = {n.lower(): n for n in reversed(names)}
    close = [lower[c] for c in difflib.get_close_matches(name.lower(), lower, n=1)]
    listed = ", ".join(names[:shown]) or "none"
    listed += f", … ({len(names)} in all)" if len(names) > shown else ""
    return "".join(f"did you mean {c!r}? " for c in close) + f"available: {listed}"
