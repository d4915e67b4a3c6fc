"""The command line: the core verbs, and the verbs of every tool.

Heavy modules are imported inside the verbs.
"""

import csv
import errno
import io
import os
import platform
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trainer import __version__, console, shipped_configs, tools
from trainer.console import DEFAULT_CONFIG, ConfigArgument, DeviceOption, JsonOption, SetOption
from trainer.errors import InputError, TrainerError, explain_user_code

if TYPE_CHECKING:
    from trainer.config import Config

_START = time.perf_counter()
# Errors of the output: a full disk, a file that may not grow.
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    help="Train, evaluate, measure and export Keras networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare or describe a data set.", no_args_is_help=True)
config_app = typer.Typer(help="List or print configurations.", no_args_is_help=True)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        versions = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras"))
        console.print_line(
            f"trainer {__version__} ({versions}, Python {platform.python_version()})"
        )
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the versions and exit"
        ),
    ] = False,
) -> None:
    """Defines the options of the program itself."""


@app.command(
    **console.in_help(
        "trainer fit configs/mnist_mlp.toml --epochs 2 --name first-try", console.TRAIN
    )
)
def fit(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML file", show_default=str(DEFAULT_CONFIG), **console.CONFIG),
    ] = None,
    *,
    resume: Annotated[
        str | None, typer.Option(help="Continue a run from its last checkpoint", **console.RUN)
    ] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides training.epochs")] = None,
    name: Annotated[str | None, typer.Option(help="Overrides logging.name")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One batch per split; no files")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Fail if an operation is not deterministic")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Profile for TensorBoard")] = False,
    json_: JsonOption = False,
) -> None:
    """Train a network, score it, and write a run."""
    flags = {
        "training.device": device,
        "training.epochs": epochs,
        "logging.name": name,
        "training.deterministic": deterministic or None,
        "logging.profile": profile or None,
    }
    if resume is None:
        loaded = console.load_config(config or DEFAULT_CONFIG, set_, flags)
    elif config or dry_run:
        raise InputError("--resume uses the run's configuration: remove CONFIG and --dry-run")
    else:
        overrides = [*(set_ or ()), *console.flags_as_overrides(flags)]
        resume, loaded = _load_resumed(resume, overrides)
    console.require(loaded.training.device)
    terminal = console.start_logging()
    with console.stdout_to_stderr():
        workflow = console.import_module("trainer.workflow")
        options = {"console": terminal, "import_seconds": time.perf_counter() - _START}
        if resume is None:
            result = workflow.fit(loaded, dry_run=dry_run, **options)
        else:
            result = workflow.resume(resume, changed=loaded, **options)
    if result.worker == 0:  # the chief
        _print_fit(result, as_json=json_)


@app.command(**console.in_help("trainer evaluate latest --split validation", console.INSPECT))
def evaluate(
    run: console.RunOrModelArgument,
    *,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    device: DeviceOption = None,
    trust: console.TrustOption = False,
    runs: console.RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Score a finished run, or a saved or exported model."""
    load = _loader(run, runs, device)
    device = console.require(device, run if load is None else None, runs)
    console.start_logging()
    with console.stdout_to_stderr():
        if load is None:
            workflow = console.import_module("trainer.workflow")
            result = workflow.evaluate(run, split=split, device=device, runs_directory=runs)
        else:
            result = load(run, trust=trust).evaluate(split)
    console.print_table(result, as_json=json_)


@app.command(**console.in_help("trainer predict latest digit.png", console.INSPECT))
def predict(
    run: console.RunOrModelArgument,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, .npy files, folders or patterns"),
    ],
    *,
    invert: Annotated[bool, typer.Option("--invert", help="Invert the brightness")] = False,
    device: DeviceOption = None,
    trust: console.TrustOption = False,
    runs: console.RunsOption = "runs",
    csv_: Annotated[bool, typer.Option("--csv", help="Print a CSV table on stdout")] = False,
    json_: JsonOption = False,
) -> None:
    """Print the class of image files.

    A file that cannot be read is reported and skipped.
    """
    load = _loader(run, runs, device)
    device = console.require(device, run if load is None else None, runs)
    console.start_logging()
    failures: list[InputError] = []
    options: dict[str, Any] = {"invert": invert, "on_error": failures.append}
    with console.stdout_to_stderr():
        if load is None:
            options |= {"device": device, "runs_directory": runs}
            results = console.import_module("trainer.workflow").predict(run, images, **options)
        else:
            results = load(run, trust=trust).predict(images, **options)
    titles = ("image", "class", "probability", "converted")
    rows = [
        (each["image"], each["class"], f"{each['probability']:.4f}", each["converted"])
        for each in results
    ]
    if json_:
        console.print_json(results)
    elif csv_:
        csv.writer(sys.stdout).writerows([titles, *rows])
    elif rows:
        console.print_rows(rows, titles=titles)
    for failure in failures:
        console.print_line(f"trainer: {failure}", err=True)
    if failures:
        raise typer.Exit(InputError.exit_code)


@app.command(**console.in_help("trainer tensorboard --port 6007", console.INSPECT))
def tensorboard(
    *,
    runs: console.RunsOption = "runs",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 6006,
) -> None:
    """Open TensorBoard on the runs.

    Only this machine can connect to it.
    """
    if not runs or not Path(runs).is_dir():
        raise InputError(f"there is no folder {runs!r}: `trainer fit` creates one")
    try:
        socket.create_server(("localhost", port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise InputError(
            f"--port: expected a free port (0: any), received {port}: {reason}"
        ) from None
    from tensorboard import program

    board = program.TensorBoard()
    # Without multifile, TensorBoard could read only the newest of a run's event files.
    board.configure(
        logdir=runs, host="localhost", port=port, reload_interval=5, reload_multifile=True
    )
    raise typer.Exit(board.main())


@data_app.command("prepare", **console.in_help("trainer data prepare configs/fashion_mnist.toml"))
def data_prepare(
    config: ConfigArgument = DEFAULT_CONFIG,
    *,
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare the data again")] = False,
    json_: JsonOption = False,
) -> None:
    """Download or read a data set, decode it, and store the arrays for `fit`."""
    facts = _data_facts("prepare", console.load_config(config, set_), overwrite=overwrite)
    console.print_table(facts, as_json=json_)


@data_app.command("info", **console.in_help("trainer data info configs/fashion_mnist.toml"))
def data_info(
    config: ConfigArgument = DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Describe a data set and verify the checksums of its files."""
    console.print_table(_data_facts("describe", console.load_config(config, set_)), as_json=json_)


@config_app.command("show", **console.in_help("trainer config show --set training.epochs=1"))
def config_show(
    config: ConfigArgument = DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Print a configuration with all defaults, and the origin of each value."""
    from trainer.config_file import add_origins, load_with_origins

    console.announce_shipped(config)
    loaded, origins = load_with_origins(config, set_ or ())
    if json_:
        console.print_json(loaded.model_dump(mode="json") | {"origins": origins})
    else:
        console.print_line(add_origins(loaded.to_toml(), origins), end="")


@config_app.command("list", **console.in_help("trainer config list"))
def config_list() -> None:
    """List the shipped configurations, which can be used in every folder."""
    files = shipped_configs.shipped().items()
    console.print_rows((name, shipped_configs.describe(path)) for name, path in files)


@config_app.command("schema", **console.in_help("trainer config schema > schema.json"))
def config_schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from trainer.config import config_schema as schema

    console.print_json(schema())


app.add_typer(data_app, name="data", rich_help_panel=console.INSPECT)
app.add_typer(config_app, name="config", rich_help_panel=console.INSPECT)
for tool_app in tools.apps():
    app.add_typer(tool_app)


def main() -> NoReturn:
    """Runs a command. An error that the user can fix is printed as one line."""

    def stop(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)  # an exception, so that files are closed

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for encodings that lack characters
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.path.append(str(Path.cwd()))  # for names such as "my_module:MyLayer"
        app()
    except Exception as error:
        explained = _explained(error)
        if explained is None:
            raise
        if os.environ.get("TRAINER_TRACEBACK") == "1":
            traceback.print_exception(error)
        with suppress(OSError):  # stderr may be the output that failed
            console.print_line(f"trainer: {explained}", err=True)
        if isinstance(error, OSError) and error.errno in _OUTPUT_ERRORS:
            os._exit(explained.exit_code)  # a normal exit would flush the output and fail again
        sys.exit(explained.exit_code)
    except SystemExit as end:
        sys.exit(_explain_end(end))
    sys.exit(0)


def _explain_end(end: SystemExit) -> Any:
    """Prints why the program ends, if a signal or the user's code ends it; returns the code."""
    if isinstance(end.__context__, BrokenPipeError):  # as in `| head`; typer and rich raise 1
        return 128 + signal.SIGPIPE
    causes = {128 + signal.SIGINT: "control-C", 128 + signal.SIGTERM: "SIGTERM"}
    if end.code in causes:
        console.print_line(f"trainer: stopped by {causes[end.code]}", err=True)
    elif (reason := explain_user_code(end)) is not None:
        console.print_line(f"trainer: the program was ended by {reason}", err=True)
        return InputError.exit_code
    return end.code


def _explained(error: Exception) -> TrainerError | None:
    """Returns an error that the user can fix; None for a defect of this package."""
    from trainer.devices import memory_error

    if isinstance(error, TrainerError):
        return error
    if (exhausted := memory_error(error)) is not None:
        return exhausted
    reason = explain_user_code(error) or (str(error) if isinstance(error, OSError) else None)
    return InputError(f"{reason}; TRAINER_TRACEBACK=1 prints the traceback") if reason else None


def _load_resumed(reference: str, overrides: list[str]) -> tuple[str, "Config"]:
    """Returns the path of a run to resume, and its configuration with the changes."""
    from trainer.config_file import load_config, parse_override
    from trainer.run import open_run

    changed = dict(map(parse_override, overrides))
    directory = str(changed.get("logging.directory", "runs"))
    run = open_run(reference, runs_directory=directory, unfinished=True)
    if "training.device" in changed:
        overrides = ["training.jit_compile=auto", *overrides]  # resolved for another device
    config = load_config(run.path / "config.toml", overrides, stored=True)
    run.check_changes(config)
    return str(run.path), config


def _loader(reference: str, runs: str, device: str | None) -> Any:
    """Returns the function that loads a saved or exported model; None for a run."""
    is_run = any((Path(folder) / reference / "config.toml").exists() for folder in ("", runs))
    loader = tools.functions().get("load")
    if not reference or is_run or not Path(reference).exists() or loader is None:
        return None
    if device is not None:
        raise InputError(f"--device: {reference} is not a run; a saved model has its own runtime")
    return console.import_module(loader).load


def _data_facts(function: str, config: "Config", **options: Any) -> dict[str, Any]:
    """Calls a function of trainer.data._verbs."""
    console.start_logging()
    with console.stdout_to_stderr():
        console.import_module("tensorflow")  # now, because this hides its import messages
        data: Any = console.import_module("trainer.data._verbs")
        return dict(getattr(data, function)(config.data, **options))


def _print_fit(result: Any, *, as_json: bool) -> None:
    """Prints the scores, the times and the run directory of a `FitResult`."""
    summary = result.summary
    if as_json:
        console.print_json(summary)
    elif result.run is None:
        console.print_line(f"dry run: {console.format_scores(summary)}")
    else:
        console.print_line(f"{summary['data']['name']}: {console.format_scores(summary)}")
        seconds = sorted(summary["seconds"].items(), key=lambda each: each[1], reverse=True)
        times = ", ".join(f"{name} {value:.1f}" for name, value in seconds if value >= 0.05)
        step = f"; {summary['step_ms']:.2f} ms per step" if summary["step_ms"] else ""
        console.print_line(f"seconds: {times}{step}")
        console.print_run(result.run.path, tensorboard=(result.run.path / "train").is_dir())
