"""The verbs of the benchmark tool."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.console import (
    DEFAULT_CONFIG,
    ConfigArgument,
    RunsOption,
    SetOption,
    import_module,
    load_config,
    print_line,
    print_rows,
    print_run,
    require,
    start_logging,
    stdout_to_stderr,
)
from trainer.errors import InputError

app = typer.Typer()
benchmark_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(benchmark_app, name="benchmark")

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
    with stdout_to_stderr():
        measure = import_module("trainer.benchmark.matmul_result")
        options = {"largest": largest, "quick": quick, "seed": seed}
        if textbook:
            result = measure.textbook_matmul(devices, **options)
        else:
            result = measure.benchmark_matmul(
                devices, shapes=shape or [], dtypes=dtype or [], **options
            )
    _keep_measured(result, runs, json_, before, tolerance)


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
    with stdout_to_stderr():
        measure = import_module("trainer.benchmark.operations").benchmark_operations
        result = measure(devices, quick=quick, seed=seed)
    _keep_measured(result, runs, json_, before, tolerance)


@benchmark_app.command("step")
def benchmark_step(
    config: ConfigArgument = DEFAULT_CONFIG,
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
    loaded, devices = load_config(config, set_), device or []
    before = _start_benchmark(json_, compare, runs, devices)
    with stdout_to_stderr():
        result = import_module("trainer.benchmark.step_result").benchmark_step(
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
    require("cpu", run, runs)
    before = _start_benchmark(json_, compare, runs)
    with stdout_to_stderr():
        measure = import_module("trainer.benchmark.formats").benchmark_formats
        result = measure(run, runs_directory=runs, quick=quick)
    _keep_measured(result, runs, json_, before, tolerance)


def _start_benchmark(
    json_: Path | None, compare: Path | None, runs: str, devices: list[str] | None = None
) -> Any:
    """Refuses what is not here, cannot be written or compared, before measuring takes its time.

    Returns:
        The result to compare with; None where there is none.
    """
    from trainer.devices import require_driver
    from trainer.files import require_writable

    for device in devices or ():
        if device.startswith("gpu"):
            require_driver(device)
    require_writable(runs, "--runs")
    _require_new_file(json_)
    start_logging()
    if compare is None:
        return None
    from trainer.benchmark.compare import read_document

    return read_document(compare)


def _keep_measured(
    result: Any, runs: str, json_: Path | None, before: Any, tolerance: float
) -> None:
    """Writes what was measured, prints it, and says what moved since an earlier result."""
    with stdout_to_stderr():
        folder = result.write(runs)
    _print_measured(result, folder, json_)
    if before is not None:
        from trainer.benchmark.compare import compare

        for line in compare(before, result.document(), tolerance=tolerance):
            print_line(line, err=True)


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
        print_line(result.json(), end="")
        return
    if json_ is not None:
        from trainer.files import write_text

        write_text(json_, result.json())
    print_line(result.subject)
    titles = result.table[0] if result.table else ()
    print_rows((row.values() for row in result.table), titles=titles)
    for plot in result.plots:
        print_line(plot)
    for line in (*result.notes, *(f"left out: {k}: {why}" for k, why in result.skipped.items())):
        print_line(line)
    print_run(folder, tensorboard=True)
