"""The command line: the core verbs, and the verbs of every tool.

Heavy modules are imported inside the verbs.
"""

import csv
import errno
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trainer import tools
from trainer.console import (
    DEFAULT_CONFIG,
    ConfigArgument,
    DeviceOption,
    JsonOption,
    RunsOption,
    SetOption,
    TrustOption,
    escape_unencodable,
    format_scores,
    import_module,
    load_config,
    print_json,
    print_line,
    print_rows,
    print_run,
    print_table,
    require,
    start_logging,
    stdout_to_stderr,
)
from trainer.errors import InputError, TrainerError, explain_user_code

if TYPE_CHECKING:
    from trainer.config import Config

_START = time.perf_counter()
# The times that `fit` prints. Each one is the sum of these times of summary.json.
_SHOWN_SECONDS = {
    "import": ("import",),
    "data": ("devices", "data", "to_device"),
    "network": ("model", "tracing"),
    "training": ("training",),
    "scoring": ("validation", "evaluation"),
    "reports": ("callbacks", "report"),
    "total": ("total",),
}
# Errors of the output: a full disk, a file that may not grow, a closed pipe.
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)

app = typer.Typer(
    help="Train, evaluate, measure and export Keras networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Prepare or describe a data set.", no_args_is_help=True)
config_app = typer.Typer(help="Print a configuration or its schema.", no_args_is_help=True)


@app.command()
def fit(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A TOML file", show_default=str(DEFAULT_CONFIG)),
    ] = None,
    *,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Continue a run from its last checkpoint"),
    ] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides training.epochs")] = None,
    name: Annotated[str | None, typer.Option(help="Overrides logging.name")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Use one batch of each split; write nothing"),
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Use deterministic operations; one that has none is an error"
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps for TensorBoard's profiler page")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train a network, score it on the test images, and write a run directory."""
    flags = {
        "training.device": device,
        "training.epochs": epochs,
        "logging.name": name,
        "training.deterministic": deterministic or None,
        "logging.profile": profile or None,
    }
    if resume is None:
        loaded = load_config(config or DEFAULT_CONFIG, set_, flags)
    else:
        given = {"CONFIG": config, "--dry-run": dry_run}
        resume, loaded = _load_resumed(resume, set_, flags, given)
    require(loaded.training.device)
    console = start_logging()
    with stdout_to_stderr():
        workflow = import_module("trainer.workflow")
        seconds = time.perf_counter() - _START
        options = {"console": console, "import_seconds": seconds}
        if resume is None:
            result = workflow.fit(loaded, dry_run=dry_run, **options)
        else:
            result = workflow.resume(resume, changed=loaded, **options)
    if result.worker == 0:  # the chief
        _print_fit(result, as_json=json_)


@app.command()
def evaluate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help='A run, "latest", or a saved or exported model'),
    ],
    *,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    device: DeviceOption = None,
    trust: TrustOption = False,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Score a finished run with its own configuration, or a saved or exported model."""
    load = _loader(run, runs, device)
    device = "auto" if device is None else device
    require(device, run if load is None else None, runs)
    start_logging()
    with stdout_to_stderr():
        if load is None:
            workflow = import_module("trainer.workflow")
            result = workflow.evaluate(run, split=split, device=device, runs_directory=runs)
        else:
            result = load(run, trust=trust).evaluate(split)
    print_table(result, as_json=json_)


@app.command()
def predict(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help='A run, "latest", or a saved or exported model'),
    ],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, .npy files, folders or patterns"),
    ],
    *,
    invert: Annotated[
        bool, typer.Option("--invert", help="Invert the brightness of the images")
    ] = False,
    device: DeviceOption = None,
    trust: TrustOption = False,
    runs: RunsOption = "runs",
    csv_: Annotated[bool, typer.Option("--csv", help="Print a CSV table on stdout")] = False,
    json_: JsonOption = False,
) -> None:
    """Print the class of image files. A file that cannot be read is reported and skipped."""
    load = _loader(run, runs, device)
    device = "auto" if device is None else device
    require(device, run if load is None else None, runs)
    start_logging()
    failures: list[InputError] = []
    options: dict[str, Any] = {"invert": invert, "on_error": failures.append}
    with stdout_to_stderr():
        if load is None:
            options |= {"device": device, "runs_directory": runs}
            results = import_module("trainer.workflow").predict(run, images, **options)
        else:
            results = load(run, trust=trust).predict(images, **options)
    titles = ("image", "class", "probability", "converted")
    rows = [
        (each["image"], each["class"], f"{each['probability']:.4f}", each["converted"])
        for each in results
    ]
    if json_:
        print_json(results)
    elif csv_:
        csv.writer(sys.stdout).writerows([titles, *rows])
    elif rows:
        print_rows(rows, titles=titles)
    for failure in failures:
        print_line(f"trainer: {failure}", err=True)
    if failures:
        raise typer.Exit(InputError.exit_code)


@app.command()
def tensorboard(
    *,
    runs: RunsOption = "runs",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 6006,
) -> None:
    """Open TensorBoard on the runs; only this machine can connect to it."""
    if not runs or not Path(runs).is_dir():
        raise InputError(f"there is no folder {runs!r}: `trainer fit` creates one")
    from tensorboard import program

    board = program.TensorBoard()
    # A run has several event files at once. Without its data server, which pip does not install
    # on every system, TensorBoard would read only the newest of them.
    board.configure(
        logdir=runs, host="localhost", port=port, reload_interval=5, reload_multifile=True
    )
    raise typer.Exit(board.main())


@data_app.command("prepare")
def data_prepare(
    config: ConfigArgument = DEFAULT_CONFIG,
    *,
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare the data again")] = False,
    json_: JsonOption = False,
) -> None:
    """Download or read a data set, decode it, and store the arrays for `fit`."""
    loaded = load_config(config, set_)
    start_logging()
    with stdout_to_stderr():
        import_module("tensorflow")  # now, because this hides its import messages
        spec = import_module("trainer.data").prepare(loaded.data, overwrite=overwrite)
    print_table(spec, as_json=json_)


@data_app.command("info")
def data_info(
    config: ConfigArgument = DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Describe a data set and verify the checksums of its files."""
    loaded = load_config(config, set_)
    start_logging()
    with stdout_to_stderr():
        import_module("tensorflow")  # `load` can prepare the data; see `data_prepare`
        spec = import_module("trainer.data._description").describe(loaded.data)
    print_table(spec, as_json=json_)


@config_app.command("show")
def config_show(
    config: ConfigArgument = DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Print a configuration with all defaults."""
    loaded = load_config(config, set_)
    if json_:
        print_json(loaded.model_dump(mode="json"))
    else:
        print_line(loaded.to_toml(), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from trainer.config import config_schema as schema

    print_json(schema())


app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
for tool_app in tools.apps():
    app.add_typer(tool_app)


def main() -> NoReturn:
    """Runs a command. An error that the user can fix is printed as one line."""

    def stop(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)  # an exception, so that files are closed

    escape_unencodable()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.path.append(str(Path.cwd()))  # for names such as "my_module:MyLayer"
    except FileNotFoundError:
        print_line("trainer: the current folder has been removed", err=True)
        sys.exit(InputError.exit_code)
    try:
        app()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUTPUT_ERRORS:
            with suppress(OSError):  # stderr may be the output that failed
                print_line(f"trainer: {error.filename or 'the output'}: {error.strerror}", err=True)
            os._exit(InputError.exit_code)  # a normal exit would flush the output and fail again
        explained = _explained(error)
        if explained is None:
            raise
        if os.environ.get("TRAINER_TRACEBACK") == "1":
            traceback.print_exception(error)
        print_line(f"trainer: {explained}", err=True)
        sys.exit(explained.exit_code)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # typer's exit code for control-C
            print_line("trainer: stopped by control-C", err=True)
        elif end.code == 128 + signal.SIGTERM:
            print_line("trainer: stopped by SIGTERM", err=True)
        raise
    sys.exit(0)


def _explained(error: Exception) -> TrainerError | None:
    """Returns an error that the user can fix; None for a defect of this package."""
    from trainer.devices import memory_error

    if isinstance(error, TrainerError):
        return error
    found = memory_error(error)
    if found is None and (reason := explain_user_code(error)) is not None:
        return InputError(f"{reason}; TRAINER_TRACEBACK=1 prints the traceback")
    return found


def _load_resumed(
    reference: str,
    changes: list[str] | None,
    flags: dict[str, Any],
    given: dict[str, Any],
) -> tuple[str, "Config"]:
    """Returns the path and the configuration of a run to resume.

    Raises:
        InputError: An option would change what is trained.
    """
    from trainer.config import parse_override
    from trainer.run import open_run

    for option, value in given.items():
        if value:
            raise InputError(f"--resume uses the configuration of the run: remove {option}")
    changed = dict(map(parse_override, changes or ())) | {k: v for k, v in flags.items() if v}
    directory = changed.get("logging.directory", "runs")
    run = open_run(reference, runs_directory=str(directory), unfinished=True)
    if "training.device" in changed and "training.jit_compile" not in changed:
        flags = flags | {"training.jit_compile": "auto"}  # resolved for another device
    config = load_config(run.path / "config.toml", changes, flags, stored=True)
    run.check_changes(config)
    return str(run.path), config


def _loader(reference: str, runs: str, device: str | None) -> Any:
    """Returns the function that loads a saved or exported model; None for the name of a run.

    Raises:
        InputError: The reference is a file or folder that is not a run, and no tool loads it, or a
            device is requested.
    """
    with suppress(OSError):  # a name that is too long for the file system
        folders = (Path(reference), Path(runs, reference))
        is_run = any((folder / "config.toml").exists() for folder in folders)
        if reference and Path(reference).exists() and not is_run:
            if device is not None:
                raise InputError(f"--device: {reference} is not a run; it uses its own runtime")
            if "load" not in tools.functions():
                raise InputError(f"{reference} is not a run, and no tool here loads other models")
            return import_module(tools.functions()["load"]).load
    return None


def _print_fit(result: Any, *, as_json: bool) -> None:
    """Prints the scores, the times and the run directory of a `FitResult`."""
    summary = result.summary
    if as_json:
        print_json(summary)
        return
    scores = format_scores(summary)
    if result.run is None:
        print_line(f"dry run: one batch of train, validation and test passed; {scores}")
        return
    seconds = summary["seconds"]
    times = ", ".join(
        f"{title} {sum(seconds.get(part) or 0.0 for part in parts):.1f}"
        for title, parts in _SHOWN_SECONDS.items()
    )
    step = f"; {summary['step_ms']:.2f} ms per step" if summary["step_ms"] else ""
    print_line(f"{summary['data']['name']}: {scores}")
    print_line(f"seconds: {times}{step}")
    print_run(result.run.path, tensorboard=result.run.tensorboard.is_dir())
