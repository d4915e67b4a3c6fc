"""The errors a person can cause or mend, each with the exit code that the command ends with.

Everything else that goes wrong is a defect: it keeps its traceback and ends with exit code 1.
"""

import difflib
import importlib.util
import re
import shlex
import signal
from collections.abc import Iterable
from pathlib import Path


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
        raise MissingError(f"{what} needs {', '.join(missing)}: pip install -e '.[{extra}]'")


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


def nearest(name: str, known: Iterable[str], *, shown: int = 12) -> str:
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
