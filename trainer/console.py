"""Shared by all verbs: options, loading a configuration, logging, and printed output.

Nothing heavy is imported here, so that `trainer --help` is fast.
"""

import importlib
import json
import logging
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from trainer import shipped_configs
from trainer.errors import shell_command

if TYPE_CHECKING:
    from trainer.config import Config


def complete_config(incomplete: str) -> list[str]:
    """Completes a configuration in a shell. If no name fits, the shell completes a file."""
    names = {path.as_posix() for path in Path("configs").glob("*.toml")}
    return sorted(
        name for name in names | shipped_configs.shipped().keys() if name.startswith(incomplete)
    )


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Completes a run in a shell, also by the name that `--name` gave."""
    runs = Path(context.params.get("runs") or "runs")
    names = [path.parent.name for path in runs.glob("*/config.toml")]
    names += [name.partition("Z-")[2] for name in names]
    return sorted({name for name in ("latest", *names) if name and name.startswith(incomplete)})


# The groups of verbs in `trainer --help`.
TRAIN, INSPECT, KEEP, MEASURE = "Train", "Inspect", "Keep", "Measure"

DEFAULT_CONFIG = Path("configs/mnist.toml")
CONFIG: dict[str, Any] = {"metavar": "CONFIG", "autocompletion": complete_config}
RUN: dict[str, Any] = {"metavar": "RUN", "autocompletion": complete_run}
ConfigArgument = Annotated[Path, typer.Argument(help="A TOML file", **CONFIG)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key; can be repeated"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout")]
DeviceOption = Annotated[str | None, typer.Option(help="auto | cpu | gpu | gpu:N | all")]
RunArgument = Annotated[str, typer.Argument(help='A run, its name, or "latest"', **RUN)]
RunOrModelArgument = Annotated[
    str, typer.Argument(help='A run, "latest", or a saved or exported model', **RUN)
]
RunsOption = Annotated[str, typer.Option(help="Folder that holds the run directories")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Allow the model to run any code; only for authors you trust"),
]


def in_help(example: str, group: str | None = None) -> dict[str, Any]:
    """Returns the arguments of a verb's decorator: an example, and its group in the help."""
    return {"epilog": f"Example: {example}", "rich_help_panel": group}


def load_config(
    path: Path, overrides: Sequence[str] | None, flags: dict[str, Any] | None = None
) -> "Config":
    """Reads a configuration and applies the options of a verb: `--set`, and others by dotted key.

    An option that is None was not given.
    """
    from trainer.config_file import load_config as load

    announce_shipped(path)
    return load(path, [*(overrides or ()), *flags_as_overrides(flags or {})])


def announce_shipped(path: Path) -> None:
    """Prints on stderr if a shipped configuration is read, because there is no such file here."""
    if (found := shipped_configs.find(path)) != path:
        print_line(f"trainer: there is no {path} here; reading {found}", err=True)


def flags_as_overrides(flags: dict[str, Any]) -> list[str]:
    """Returns options by dotted key as values of `--set`, without those that were not given."""
    given = {key: value for key, value in flags.items() if value is not None}
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]


def require(device: str | None, run: str | None = None, runs: str = "runs") -> str:
    """Checks that a device and a run, if given, exist, before the slow import of TensorFlow.

    Returns the device; None becomes "auto".
    """
    from trainer.devices import require_driver
    from trainer.run import open_run

    device = "auto" if device is None else device
    require_driver(device)
    if run is not None:
        open_run(run, runs_directory=runs)
    return device


def import_module(name: str) -> Any:
    """Imports a module that imports TensorFlow, without messages and rarely used packages."""
    from trainer.devices import gpu_driver_files
    from trainer.startup import lean_imports

    # Errors are printed if there is a GPU driver; without one, the missing CUDA is not an error.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if gpu_driver_files() else "3")
    with _without_import_messages(), lean_imports():
        return importlib.import_module(name)


@contextmanager
def _without_import_messages() -> Iterator[None]:
    """Hides what TensorFlow writes to file descriptor 2 before its log level takes effect.

    TF_CPP_MIN_LOG_LEVEL=0 shows it.
    """
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        yield
        return
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def stdout_to_stderr() -> AbstractContextManager[Any]:
    """Redirects the output of callbacks and users' modules to stderr: stdout is for the result."""
    return redirect_stdout(sys.stderr)


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Raises an error. rich would end the process, but a training continues."""
        raise BrokenPipeError


class _Handler(logging.Handler):
    console = _Terminal(stderr=True)

    def emit(self, record: logging.LogRecord) -> None:
        text = Text(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = Text(f"WARNING: {text}", "bold yellow")
        with suppress(OSError):  # the terminal was closed; the training continues
            self.console.print(text, soft_wrap=True)


def start_logging() -> Console:
    """Prints the log of the package to stderr. Returns its console, for a progress bar."""
    handler = _Handler(logging.INFO)
    logger = logging.getLogger("trainer")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # tensorflow-datasets adds a handler to the root logger
    logger.handlers = [handler]
    logging.getLogger("absl").setLevel(logging.ERROR)  # tensorflow-datasets logs every step
    return handler.console


def print_line(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Prints a line in the encoding of the stream and flushes it (typer.echo may differ)."""
    print(text, end=end, file=sys.stderr if err else sys.stdout, flush=True)


def print_json(content: Any) -> None:
    """Prints a JSON document on stdout, in ASCII, which every locale can read."""
    print_line(json.dumps(content, indent=2, allow_nan=False))


def print_table(facts: dict[str, Any], *, as_json: bool = False) -> None:
    """Prints names and values, one per line, or as one JSON document."""
    if as_json:
        print_json(facts)
        return
    rows = []
    for key, value in facts.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = ", ".join(map(str, value))
        rows.append((Text(key, "bold"), text))
    print_rows(rows)


def print_rows(
    rows: Iterable[Iterable[str | Text]], *, titles: Collection[str] = (), dense: bool = False
) -> None:
    """Prints a table on stdout. A terminal wraps long cells; a pipe gets them on one line.

    Args:
        rows: The cells. Strings are printed without rich's markup.
        titles: Titles of the columns; empty: a table without a header.
        dense: Columns are close together, and a terminal wraps only cells of the first.
    """
    columns = [Column(Text(title)) for title in titles]
    box = SIMPLE_HEAD if titles else None
    table = Table(*columns, box=box, show_header=bool(titles), padding=(0, 0 if dense else 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    for number, column in enumerate(table.columns):
        column.overflow = "fold"
        column.no_wrap = dense and number > 0
    Console(width=None if sys.stdout.isatty() else 1_000_000).print(table)


def print_run(run: Path, *, tensorboard: bool) -> None:
    """Prints the folder of a result, and the command that opens it in TensorBoard."""
    command = f"; see it with `{tensorboard_command(run.parent)}`" if tensorboard else ""
    print_line(f"saved in {run}{command}")


def tensorboard_command(runs: Path) -> str:
    """Returns the command that opens TensorBoard on a folder of runs."""
    options: list[str | Path] = [] if runs == Path("runs") else ["--runs", runs]
    return shell_command("tensorboard", *options)


def format_scores(summary: dict[str, Any]) -> str:
    """Returns the test scores of a summary as text."""
    numbers = {k: v for k, v in summary["test"].items() if isinstance(v, float)}
    return ", ".join(f"test {name} {value:.4f}" for name, value in numbers.items())
