"""The errors a person can cause or mend, each with the exit code that the command ends with.

Everything else that goes wrong is a defect: it keeps its traceback and ends with exit code 1.
"""

import difflib
import importlib.util
import re
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
        super().__init__(" ".join(re.sub(r"\x1b\[[0-9;]*m", "", message).split()))


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
