"""The command line: parse, call, print. Heavy imports wait until a verb needs them."""

import errno
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
import typer.core
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from trainer.errors import (
    CheckError,
    InputError,
    TrainerError,
    explain_user_code,
    nearest,
    shell_command,
)

if TYPE_CHECKING:
    from trainer.config import Config

_START = time.perf_counter()

app = typer.Typer(
    help="Train, watch, measure and keep Keras networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Prepare a data set, or say what it is.", no_args_is_help=True)
benchmark_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
config_app = typer.Typer(help="Show a configuration, or the schema of all.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(config_app, name="config")

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file", show_default=True)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; repeatable"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="auto | cpu | gpu | gpu:N | all")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help='A run directory, its name, or "latest"')
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Measure less, in under a minute")]
JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help='Also write one JSON document; "-": on stdout'),
]
BenchmarkDeviceOption = Annotated[
    list[str] | None,
    typer.Option("--device", help="cpu | cpu:N | gpu | gpu:N | all; repeatable; default: all"),
]
CompareOption = Annotated[
    Path | None,
    typer.Option("--compare", metavar="OLD.json", help="Say what moved since, beyond noise"),
]
ToleranceOption = Annotated[
    float, typer.Option(min=0, help="With --compare: exit code 4 beyond this share slower")
]
RunsOption = Annotated[str, typer.Option("--runs", help="Folder that holds the run directories")]

_DEFAULT_CONFIG = Path("configs/mnist.toml")
_DEFAULT_SEARCH = Path("configs/mnist_tune.toml")
# Where the time went, as `fit` says it; summary.json has each part by itself.
_SHOWN_SECONDS = {
    "import": ("import",),
    "data": ("devices", "data", "to_device"),
    "network": ("model", "tracing"),
    "training": ("training",),
    "scoring": ("validation", "evaluation"),
    "reports": ("callbacks", "report"),
    "total": ("total",),
}
# A disk that is full, a file that may not grow, and a reader that is gone.
_NOTHING_MORE_IS_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)
# A table that is no terminal's is as wide as its cells; rich wants a number all the same.
_PIPE_WIDTH = 1_000_000
# Rows of a search's table: the best; results.json has all.
_SHOWN_TRIALS = 10


@app.command()
def fit(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A TOML file", show_default=str(_DEFAULT_CONFIG)),
    ] = None,
    *,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Go on with a run from its last checkpoint"),
    ] = None,
    device: DeviceOption = None,
    set_: SetOption = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides training.epochs")] = None,
    name: Annotated[str | None, typer.Option(help="Overrides logging.name")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="One batch of train, validation and test; makes no run"),
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Refuse operations whose result can vary")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps for TensorBoard's profiler page")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Train a network, score it on the test images and keep all of it in a run directory."""
    from trainer.cluster import read_cluster
    from trainer.figure_process import FigureProcess

    flags = {
        "training.device": device,
        "training.epochs": epochs,
        "logging.name": name,
        "training.deterministic": deterministic or None,
        "logging.profile": profile or None,
    }
    if resume is None:
        loaded = _load(config or _DEFAULT_CONFIG, set_, flags)
    else:
        given = {"CONFIG": config, "--dry-run": dry_run}
        resume, loaded = _load_resumed(resume, set_, flags, given)
    _require(loaded.training.device)
    cluster = read_cluster()
    console = _start_logging()
    quiet = dry_run or not (cluster is None or cluster.chief)  # these draw nothing
    drawing = nullcontext() if quiet else FigureProcess()
    with drawing as draw, _stdout_for_the_result():
        workflow = _workflow()
        seconds = time.perf_counter() - _START
        options = {"console": console, "import_seconds": seconds, "draw": draw}
        if resume is None:
            fitted = workflow.fit(loaded, dry_run=dry_run, **options)
        else:
            fitted = workflow.resume(resume, changed=loaded, **options)
    if fitted.worker > 0:
        return  # the chief tells
    if json_:
        _print_json(fitted.summary)
    elif fitted.run is None:
        scores = _scores(fitted.summary)
        _print(f"dry run: a batch of train, validation and test each went through; {scores}")
    else:
        _print_result(fitted.summary, tensorboard=loaded.logging.tensorboard)


@app.command()
def tune(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="A TOML file with [tuning.space]", show_default=True),
    ] = _DEFAULT_SEARCH,
    *,
    name: Annotated[
        str | None,
        typer.Option(help="Of the search, kept in runs/tune-NAME; overrides logging.name"),
    ] = None,
    set_: SetOption = None,
    trials: Annotated[int | None, typer.Option(help="Overrides tuning.trials")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that train at the same time; 0: this one alone")
    ] = 0,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Train the best on train and validation, score test once"),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Search for better settings; the same command goes on with a search that was interrupted."""
    from trainer.tuning.space import check_space

    loaded = _load(config, set_, {"tuning.trials": trials, "logging.name": name})
    check_space(loaded)
    _require(loaded.training.device)
    console = _start_logging()
    with _stdout_for_the_result():
        result = _import("trainer.tuning.search").tune(
            loaded, workers=workers, refit=refit, console=console
        )
    if result is None:
        return  # a worker: the chief has the result
    if json_:
        _print_json(result)
    else:
        _print_search(result)


@app.command()
def evaluate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help='A run, "latest", or a saved or exported model'),
    ],
    *,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    device: DeviceOption = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run code that a saved model holds: know its maker")
    ] = False,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Score a finished run again, by its own configuration; or a saved or exported model."""
    saved = _is_saved_model(run, runs)
    if saved and device is not None:
        raise InputError(f"--device: {run} is no run; a saved model is scored by its own runtime")
    device = "auto" if device is None else device
    _require(device, None if saved else run, runs)
    _start_logging()
    with _stdout_for_the_result():
        if saved:
            with _without_chatter():
                result = _saving("loading").load(run, trust=trust).evaluate(split)
        else:
            result = _workflow().evaluate(run, split=split, device=device, directory=runs)
    if json_:
        _print_json(result)
        return
    _print_table(result)


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG or .npy files")
    ],
    *,
    invert: Annotated[
        bool, typer.Option("--invert", help="Exchange dark and bright first")
    ] = False,
    device: DeviceOption = None,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Name the class of image files; one that cannot be read is reported, and the rest named."""
    device = "auto" if device is None else device
    _require(device, run, runs)
    _start_logging()
    failures: list[InputError] = []
    with _stdout_for_the_result():
        options = {"invert": invert, "device": device, "directory": runs}
        results = _workflow().predict(run, images, **options, on_error=failures.append)
    if json_:
        _print_json(results)
    elif results:
        rows = [
            (each["image"], each["class"], f"{each['probability']:.4f}", each["converted"])
            for each in results
        ]
        _print_rows(rows, titles=("image", "class", "probability", "converted"))
    for failure in failures:
        _print(f"trainer: {failure}", err=True)
    if failures:
        raise typer.Exit(InputError.exit_code)


@app.command()
def save(
    run: RunArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="name.keras or name.weights.h5")],
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there")
    ] = False,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Write the model of a run into one Keras file."""
    _require("cpu", run, runs)
    _start_logging()
    with _stdout_for_the_result():
        result = _saving("files").save(run, path, overwrite=overwrite, runs=runs)
    _print_facts(result, as_json=json_)


@app.command()
def load(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run, a saved or an exported model")
    ],
    *,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Score it on the test images it was made for")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Accept code and any operation: know its maker")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Say what a model is; any format will do."""
    _start_logging()
    with _stdout_for_the_result(), _without_chatter():
        loaded = _saving("loading").load(path, trust=trust)
        result = loaded.facts() | (loaded.evaluate() if evaluate else {})
    _print_facts(result, as_json=json_)


@app.command()
def export(
    run: RunArgument,
    *,
    format_: Annotated[
        str, typer.Option("--format", help="saved_model | litert | litert_int8 | onnx")
    ] = "saved_model",
    name: Annotated[
        str | None,
        typer.Option(
            help="Of the model (default: data-network); -FORMAT is added to all but saved_model"
        ),
    ] = None,
    directory: Annotated[
        str, typer.Option("--directory", help="Folder that holds exported models")
    ] = "saved_models",
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Write a new version of a model for deployment, proven equal in another process."""
    _require("cpu", run, runs)
    _start_logging()
    with _stdout_for_the_result(), _without_chatter():
        folder, exported = _saving("export").export(
            run, format_, name=name, directory=directory, runs=runs
        )
    verified = exported.verified.model_dump()
    _print_facts({"path": str(folder), "format": exported.format, **verified}, as_json=json_)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An exported model or a version")],
    *,
    trust: Annotated[
        bool, typer.Option("--trust", help="Accept any operation in it: know its maker")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Check an exported model: its sums, and its answers in another process."""
    _start_logging()
    with _stdout_for_the_result(), _without_chatter():
        folder, verified = _saving("export").verify(path, trust=trust)
    result = {"result": "unchanged, and the same answers to the images kept with it"}
    _print_facts({"path": str(folder), **result, **verified.model_dump()}, as_json=json_)


@app.command()
def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An exported model or its folder")],
    *,
    directory: Annotated[
        str, typer.Option("--directory", help="Folder that holds exported models")
    ] = "saved_models",
    host: Annotated[str, typer.Option(help="Address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8501,
    most_bytes: Annotated[
        int, typer.Option("--most-bytes", min=1, help="The largest body of a request")
    ] = 16_000_000,
    trust: Annotated[
        bool, typer.Option("--trust", help="Accept any operation in it: know its maker")
    ] = False,
) -> None:
    """Serve an exported model over HTTP, as TensorFlow Serving does."""
    _start_logging()
    run_server = _import("trainer.serving.server").serve
    run_server(name, directory=directory, host=host, port=port, most_bytes=most_bytes, trust=trust)


@app.command()
def tensorboard(
    *,
    runs: RunsOption = "runs",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 6006,
) -> None:
    """Open TensorBoard on the runs; it listens on this machine only."""
    if not runs or not Path(runs).is_dir():
        raise InputError(f"there is no folder {runs!r}: `trainer fit` makes one")
    from tensorboard import program

    board = program.TensorBoard()
    # A run's folder has several event files at once. Without its data server, which pip does not
    # install everywhere, TensorBoard otherwise reads the newest one only, and the curves stop.
    board.configure(
        logdir=runs, host="localhost", port=port, reload_interval=5, reload_multifile=True
    )
    with _without_chatter():
        code = board.main()
    raise typer.Exit(code)


@app.command()
def doctor(
    config: ConfigArgument = _DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Say what this machine can do, and what to do about what it cannot."""
    from dataclasses import asdict

    from trainer.config import Config

    given = config != _DEFAULT_CONFIG or config.exists() or set_
    with _stdout_for_the_result(), _without_chatter():
        examine = _import("trainer.doctor.checks").examine
        findings = examine(_load(config, set_) if given else Config())
    if json_:
        _print_json([asdict(finding) for finding in findings])
        return
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    _print_rows(
        (
            Text(finding.status, styles[finding.status]),
            Text(finding.subject, "bold"),
            finding.value + (f"\n-> {finding.remedy}" if finding.remedy else ""),
        )
        for finding in findings
    )


@benchmark_app.command("matmul")
def benchmark_matmul(
    *,
    device: BenchmarkDeviceOption = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="dot | square; repeatable; default: both")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="float32 | bfloat16 | float16; repeatable; default: all"),
    ] = None,
    largest: Annotated[int | None, typer.Option(help="The largest n; default: by effort")] = None,
    textbook: Annotated[
        bool, typer.Option("--textbook", help="What the book prints, beside what it should print")
    ] = False,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the numbers and of the order")] = 0,
    runs: RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the same matrix product at growing size on every device."""
    devices = device or []
    if textbook and (shape or dtype or compare):
        raise InputError("--textbook shows the book's own program: no --shape, --dtype, --compare")
    before = _start_benchmark(json_, compare, runs, devices)
    with _stdout_for_the_result():
        measure = _import("trainer.benchmark.matmul_result")
        options = {"largest": largest, "quick": quick, "seed": seed}
        if textbook:
            result = measure.textbook_matmul(devices, **options)
        else:
            result = measure.benchmark_matmul(
                devices, shapes=shape or [], dtypes=dtype or [], **options
            )
    _keep_measured(result, runs, json_, before, tolerance)


class _ExpressionCommand(typer.core.TyperCommand):
    """A command whose argument may begin with a minus: only `--word` is an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses unknown options; click takes them for arguments by `ignore_unknown_options`."""
        known = [name for option in self.get_params(ctx) for name in option.opts]
        for arg in args[: args.index("--")] if "--" in args else args:
            name = arg.partition("=")[0]
            if re.fullmatch("--[A-Za-z-]+", name) and name not in known:
                options = [name for name in known if name.startswith("--")]
                raise InputError(f"there is no option {name}: {nearest(name, options)}")
        return super().parse_args(ctx, args)


@app.command(cls=_ExpressionCommand, context_settings={"ignore_unknown_options": True})
def gradient(
    expression: Annotated[
        str | None,
        typer.Argument(metavar="EXPR", help="Of named numbers, vectors and matrices"),
    ] = None,
    *,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="NAME=VALUE,...", help="a=1,x=[1,2],A=[[1,2],[3,4]]"),
    ] = None,
    wrt: Annotated[
        str | None, typer.Option("--wrt", metavar="NAME,...", help="Variables to differentiate by")
    ] = None,
    order: Annotated[int, typer.Option(help="2 gives second derivatives; up to 4")] = 1,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="CONFIG", help="Check the network of a TOML file instead"),
    ] = None,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Differentiate an expression three ways, or check the gradients of a network."""
    if model is not None and (expression, at, wrt, order) != (None, None, None, 1):
        raise InputError(
            "--model takes the network's own loss: expected no EXPR, --at, --wrt, --order"
        )
    _start_logging()
    with _stdout_for_the_result(), _without_chatter():
        if model is None:
            derive = _import("trainer.gradient.comparison").derive
            result: Any = derive(expression, at=at, wrt=wrt, order=order)
        else:
            check = _import("trainer.gradient.network").check
            result = check(_load(model, None))
        folder = result.write(runs)
    _print_gradient(result, folder, as_json=json_)
    if not result.passed:
        raise CheckError(result.verdict)


@benchmark_app.command("operations")
def benchmark_operations(
    *,
    device: BenchmarkDeviceOption = None,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the numbers and of the order")] = 0,
    runs: RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the operations and layers of networks, forward and with their gradient."""
    devices = device or []
    before = _start_benchmark(json_, compare, runs, devices)
    with _stdout_for_the_result():
        measure = _import("trainer.benchmark.operations").benchmark_operations
        result = measure(devices, quick=quick, seed=seed)
    _keep_measured(result, runs, json_, before, tolerance)


@benchmark_app.command("step")
def benchmark_step(
    config: ConfigArgument = _DEFAULT_CONFIG,
    *,
    device: BenchmarkDeviceOption = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", help="Repeatable; default: 32 to 2048 and the file's own"),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="float32 | mixed_bfloat16 | mixed_float16; repeatable; default: float32 and what "
            '"auto" chooses',
        ),
    ] = None,
    jit_compile: Annotated[
        bool | None,
        typer.Option("--jit-compile/--no-jit-compile", help="With XLA or without; default: both"),
    ] = None,
    set_: SetOption = None,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    runs: RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the training step of a configuration, and say where its time goes."""
    loaded, devices = _load(config, set_), device or []
    before = _start_benchmark(json_, compare, runs, devices)
    with _stdout_for_the_result():
        result = _import("trainer.benchmark.step_result").benchmark_step(
            loaded,
            devices,
            batch_sizes=batch_size or [],
            precisions=precision or [],
            jit_compile=jit_compile,
            quick=quick,
        )
    _keep_measured(result, runs, json_, before, tolerance)


@benchmark_app.command("formats")
def benchmark_formats(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help='A run directory, its name, or "latest"')
    ] = "latest",
    *,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    runs: RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Compare the formats a model can be exported to: size, speed, and what is lost."""
    _require("cpu", run, runs)
    before = _start_benchmark(json_, compare, runs)
    with _stdout_for_the_result(), _without_chatter():
        measure = _import("trainer.benchmark.formats").benchmark_formats
        result = measure(run, runs=runs, quick=quick)
    _keep_measured(result, runs, json_, before, tolerance)


@data_app.command("prepare")
def data_prepare(
    config: ConfigArgument = _DEFAULT_CONFIG,
    *,
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make prepared data anew")] = False,
    json_: JsonOption = False,
) -> None:
    """Fetch or build a data set and decode it, once."""
    loaded = _load(config, set_)
    _start_logging()
    with _stdout_for_the_result():
        spec = _workflow().prepare_data(loaded.data, overwrite=overwrite)
    _print_facts(spec, as_json=json_)


@data_app.command("info")
def data_info(
    config: ConfigArgument = _DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Say what a data set is; its files are read and their sums checked."""
    loaded = _load(config, set_)
    _start_logging()
    with _stdout_for_the_result():
        spec = _workflow().describe_data(loaded.data)
    _print_facts(spec, as_json=json_)


@config_app.command("show")
def config_show(
    config: ConfigArgument = _DEFAULT_CONFIG, *, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Print a configuration, complete with every default."""
    loaded = _load(config, set_)
    if json_:
        _print_json(loaded.model_dump(mode="json"))
    else:
        _print(loaded.to_toml(), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from trainer.config import config_schema as schema

    _print_json(schema())


def main() -> NoReturn:
    """Runs the command; a person's mistake is one line and the exit code of its kind."""

    def stop(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)  # an exception: files are closed, the terminal given back

    _escape_unencodable()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.path.append(str(Path.cwd()))  # where "my_module:MyLayer" is looked for
    except FileNotFoundError:
        _print("trainer: the folder you are in has been removed", err=True)
        sys.exit(InputError.exit_code)
    try:
        app()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NOTHING_MORE_IS_WRITTEN:
            with suppress(OSError):  # which may be the very place that takes no more
                _print(f"trainer: {error.filename or 'the output'}: {error.strerror}", err=True)
            os._exit(InputError.exit_code)  # without a last try to write what could not be written
        explained = _explained(error)
        if explained is None:
            raise
        if os.environ.get("TRAINER_TRACEBACK") == "1":
            traceback.print_exception(error)
        _print(f"trainer: {explained}", err=True)
        sys.exit(explained.exit_code)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # what typer makes of control-C, without a word
            _print("trainer: stopped by control-C", err=True)
        elif end.code == 128 + signal.SIGTERM:
            _print("trainer: stopped by SIGTERM", err=True)
        raise
    sys.exit(0)


def _explained(error: Exception) -> TrainerError | None:
    """Returns an error that a person can mend; None: it is a defect of this package."""
    from trainer.devices import memory_error

    if isinstance(error, TrainerError):
        return error
    found = memory_error(error)
    if found is None and (reason := explain_user_code(error)) is not None:
        return InputError(f"{reason}; TRAINER_TRACEBACK=1 prints the traceback")
    return found


def _escape_unencodable() -> None:
    r"""Makes stdout and stderr print a character that their encoding lacks as `\u2026`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _load(path: Path, changes: list[str] | None, flags: dict[str, Any] | None = None) -> "Config":
    from trainer.config import load_config

    config = load_config(path, changes or ())
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    return config.with_changes(given) if given else config


def _load_resumed(
    reference: str,
    changes: list[str] | None,
    flags: dict[str, Any],
    given: dict[str, Any],
) -> tuple[str, "Config"]:
    """Returns the path and configuration of a run to resume; refuses changes of what is trained."""
    from trainer.config import parse_override
    from trainer.run import open_run

    for option, value in given.items():
        if value:
            raise InputError(f"--resume takes everything from the run: expected no {option}")
    changed = dict(map(parse_override, changes or ())) | {k: v for k, v in flags.items() if v}
    directory = changed.get("logging.directory", "runs")
    run = open_run(reference, directory=str(directory), unfinished=True)
    if "training.device" in changed and "training.jit_compile" not in changed:
        flags = flags | {"training.jit_compile": "auto"}  # it was resolved for another device
    return str(run.path), run.continued(_load(run.path / "config.toml", changes, flags))


def _require(device: str, run: str | None = None, runs: str = "runs") -> None:
    """Refuses a missing GPU or run before the seconds that importing TensorFlow takes."""
    from trainer.devices import require_driver
    from trainer.run import open_run

    require_driver(device)
    if run is not None:
        open_run(run, directory=runs)


def _is_saved_model(reference: str, runs: str) -> bool:
    """Says whether a reference names a file or a folder that is no run."""
    folders = (Path(reference), Path(runs, reference))
    with suppress(OSError):  # a name too long for the file system names nothing
        is_run = any((folder / "config.toml").exists() for folder in folders)
        return bool(reference) and Path(reference).exists() and not is_run
    return False


def _stdout_for_the_result() -> AbstractContextManager[Any]:
    """Sends what others print (callbacks, a person's own modules) to stderr, beside the notices."""
    return redirect_stdout(sys.stderr)


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps the lines that TensorFlow and LiteRT say about themselves from the terminal.

    It writes them to file descriptor 2 before its own log level counts; TF_CPP_MIN_LOG_LEVEL=0
    lets them through. The filter is a process of its own, so that what TensorFlow says when it
    crashes is still seen.
    """
    import shutil
    import subprocess

    from trainer.devices import gpu_driver_files

    if not gpu_driver_files():
        # Where there is no driver, TensorFlow's error that CUDA does not start is no news.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    grep = shutil.which("grep")
    if sys.stderr is None:  # closed by whoever started us
        yield
        return
    if grep is None or os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    chatter = (
        r"^WARNING: All log messages before absl|^I0000 |^To enable the following instruct"
        r"|^fully_quantize: |^INFO: Created TensorFlow Lite XNNPACK"
    )
    command = [grep, "--line-buffered", "-vE", chatter]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal)
    stdin = cast("IO[bytes]", process.stdin)
    os.dup2(stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        stdin.close()
        # A child of ours that still writes there (TensorBoard's server) keeps the filter alive.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)


def _workflow() -> Any:
    return _import("trainer.workflow")


def _saving(module: str) -> Any:
    return _import(f"trainer.saving.{module}")


def _import(module: str) -> Any:
    """Imports what brings TensorFlow along."""
    import importlib

    from trainer.startup import lean_imports

    with _without_chatter(), lean_imports():
        return importlib.import_module(module)


def _start_logging() -> Console:
    """Shows what the package logs on stderr: notices in a frame that no one can miss."""
    import logging

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            """Raises, where rich would end the program: a training goes on without a reader."""
            raise BrokenPipeError

    console = Terminal(stderr=True)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            try:
                if record.levelno >= logging.WARNING:
                    console.print(Panel(Text(message), title="NOTICE", border_style="bold yellow"))
                else:
                    console.print(message, highlight=False, markup=False, soft_wrap=True)
            except OSError:  # the terminal is gone: a training goes on, and log.txt has every line
                logging.getLogger("trainer").removeHandler(self)

    logger = logging.getLogger("trainer")
    logger.setLevel(logging.INFO)
    logger.propagate = False  # tensorflow-datasets gives the root logger a handler of its own
    logger.handlers = [Handler(logging.INFO)]
    logging.getLogger("absl").setLevel(logging.ERROR)  # tensorflow-datasets tells every step
    return console


def _print(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Prints a line at once; unlike typer's echo, never in another encoding than the stream's."""
    print(text, end=end, file=sys.stderr if err else sys.stdout, flush=True)


def _print_json(content: Any) -> None:
    # ASCII reads the same under every locale.
    _print(json.dumps(content, indent=2, allow_nan=False))


def _print_result(summary: dict[str, Any], *, tensorboard: bool) -> None:
    seconds = summary["seconds"]
    times = ", ".join(
        f"{title} {sum(seconds.get(part) or 0.0 for part in parts):.1f}"
        for title, parts in _SHOWN_SECONDS.items()
    )
    step = summary["step_ms"]
    _print(f"{summary['data']['name']}: {_scores(summary)}")
    _print(f"seconds: {times}" + (f"; {step:.2f} ms a step" if step else ""))
    _print_kept(Path(summary["run"]), tensorboard=tensorboard)


def _print_search(result: dict[str, Any]) -> None:
    sign = -1 if result["direction"] == "max" else 1
    scored = [trial for trial in result["trials"] if trial["score"] is not None]
    best = sorted(scored, key=lambda trial: sign * trial["score"])[:_SHOWN_TRIALS]
    from trainer.tuning.space import short_names

    keys = list(dict.fromkeys(key for trial in result["trials"] for key in trial["values"]))
    names = short_names(keys)
    rows = []
    for trial in best:
        values = [_shown_value(trial["values"].get(key, "")) for key in keys]
        cells = [trial["trial"], f"{trial['score']:.5g}", *values]
        cells += [f"{trial['trained_epochs']}/{trial['epochs']}", f"{trial['seconds']:.1f}"]
        rows.append(cells)
    _print_rows(rows, titles=("trial", result["objective"], *names.values(), "epochs", "s"))
    failed = sum(trial["status"] == "failed" for trial in result["trials"])
    pruned = sum(trial["status"] == "pruned" for trial in result["trials"])
    count = len(result["trials"])
    _print(f"{count} trials, {pruned} pruned, {failed} failed; {result['seconds']:.0f} s")
    importance = result["importance"] or {}
    shares = ", ".join(f"{names.get(key, key)} {share:.0%}" for key, share in importance.items())
    _print(f"importance: {shares}{' ' if shares else ''}({result['importance_note']})")
    if "refit" in result:
        refit = result["refit"]
        _print(f"refit on train and validation: {_scores(refit)}; kept in {refit['run']}")
    search = Path(result["search"])
    _print(f"the best: `{shell_command('fit', search / 'best.toml')}`; see all with")
    _print(f"`{_tensorboard_command(search)}`")


def _print_kept(run: Path, *, tensorboard: bool) -> None:
    """Prints where a result is, and the command that shows it."""
    seen = f"; see it with `{_tensorboard_command(run.parent)}`" if tensorboard else ""
    _print(f"kept in {run}{seen}")


def _tensorboard_command(runs: Path) -> str:
    options: list[str | Path] = [] if runs == Path("runs") else ["--runs", runs]
    return shell_command("tensorboard", *options)


def _shown_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(summary: dict[str, Any]) -> str:
    numbers = {k: v for k, v in summary["test"].items() if isinstance(v, float)}
    return ", ".join(f"test {name} {value:.4f}" for name, value in numbers.items())


def _print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(facts)
    else:
        _print_table(facts)


def _print_table(rows: dict[str, Any]) -> None:
    shown = []
    for key, value in rows.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = ", ".join(map(str, value))
        shown.append((Text(key, "bold"), text))
    _print_rows(shown)


def _print_rows(rows: Iterable[Iterable[str | Text]], *, titles: Collection[str] = ()) -> None:
    """Prints a table on stdout. No cell is shortened: a terminal folds it, a pipe has no width.

    Args:
        rows: The cells; a string is printed as it is, without rich's markup.
        titles: Of the columns; none: a table without a head.
    """
    style: dict[str, Any] = {"box": None, "show_header": False, "padding": (0, 1)}
    if titles:
        style = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(*(Column(Text(title)) for title in titles), **style)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    for column in table.columns:
        column.overflow = "fold"
    size: dict[str, Any] = {} if sys.stdout.isatty() else {"width": _PIPE_WIDTH, "height": 1}
    Console(**size).print(table)


def _start_benchmark(
    json_: Path | None, compare: Path | None, runs: str, devices: list[str] | None = None
) -> Any:
    """Refuses what is not here, cannot be written or compared, before measuring takes its time.

    Returns:
        The result to compare with; None where there is none.
    """
    from trainer.devices import require_driver
    from trainer.run import require_writable

    for device in devices or ():
        if device.startswith("gpu"):
            require_driver(device)
    require_writable(runs, "--runs")
    _require_new_file(json_)
    _start_logging()
    if compare is None:
        return None
    from trainer.benchmark.compare import read_document

    return read_document(compare)


def _keep_measured(
    result: Any, runs: str, json_: Path | None, before: Any, tolerance: float
) -> None:
    """Writes what was measured, prints it, and says what moved since an earlier result."""
    with _stdout_for_the_result():
        folder = result.write(runs)
    _print_measured(result, folder, json_)
    if before is not None:
        from trainer.benchmark.compare import compare

        for line in compare(before, result.document(), tolerance=tolerance):
            _print(line, err=True)


def _print_gradient(result: Any, folder: Path, *, as_json: bool) -> None:
    if as_json:
        _print_json(result.document() | {"run": str(folder)})
        return
    rows = result.table()
    _print(result.title)
    _print_rows((row.values() for row in rows), titles=rows[0])
    for line in result.lines:
        _print(line)
    _print_kept(folder, tensorboard=(folder / "tensorboard").is_dir())


def _require_new_file(path: Path | None) -> None:
    """Refuses a file that cannot be written before what it is for has taken its time."""
    if path is None or path == Path("-"):
        return
    if os.path.lexists(path):
        raise InputError(f"--json: {path} exists already and is left as it is: name another")
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        raise InputError(f"--json: {path} cannot be written: {error.strerror}") from None


def _print_measured(result: Any, folder: Path, json_: Path | None) -> None:
    if json_ == Path("-"):
        _print(result.json(), end="")
        return
    if json_ is not None:
        from trainer.run import write_text

        write_text(json_, result.json())
    _print(result.subject)
    titles = result.table[0] if result.table else ()
    _print_rows((row.values() for row in result.table), titles=titles)
    for plot in result.plots:
        _print(plot)
    for line in (*result.notes, *(f"left out: {k}: {why}" for k, why in result.skipped.items())):
        _print(line)
    _print_kept(folder, tensorboard=True)
