"""The verbs of `trainer benchmark`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer import console
from trainer.errors import InputError, did_you_mean

app = typer.Typer()
verbs = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(verbs, name="benchmark")

DevicesOption = Annotated[
    list[str] | None,
    typer.Option("--device", help="cpu | cpu:N | gpu | gpu:N | all; repeatable; default: all"),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Measure less, in under a minute")]
CompareOption = Annotated[
    Path | None, typer.Option("--compare", metavar="OLD.json", help="Print changes beyond noise")
]
ToleranceOption = Annotated[
    float, typer.Option(min=0, help="--compare: exit code 4 if slower by more than this fraction")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Random seed for numbers and order")]
JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help='Also write one JSON document; "-": on stdout'),
]
_SHAPES, _DTYPES = ("dot", "square"), ("float32", "bfloat16", "float16")
_PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


@verbs.command("matmul")
def matmul(
    *,
    device: DevicesOption = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="dot | square; repeatable; default: both")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="float32 | bfloat16 | float16; repeatable; default: all"),
    ] = None,
    largest: Annotated[int | None, typer.Option(help="The largest n")] = None,
    textbook: Annotated[
        bool, typer.Option("--textbook", help="Time as the textbook does, and with a correct clock")
    ] = False,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    seed: SeedOption = 0,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time matrix products of growing size on every device."""
    if textbook and (shape or dtype or compare):
        raise InputError("--textbook cannot be combined with --shape, --dtype or --compare")
    _check("--shape", shape, _SHAPES)
    _check("--dtype", dtype, _DTYPES)
    _check("--largest", [] if largest is None else [largest])
    options: dict[str, Any] = {"largest": largest, "quick": quick, "seed": seed}
    if not textbook:
        options |= {"shapes": shape or [*_SHAPES], "dtypes": dtype or [*_DTYPES]}
    function = "matmul.textbook_matmul" if textbook else "matmul.benchmark_matmul"
    _run(function, (runs, json_, compare, tolerance), _devices(device), **options)


@verbs.command("operations")
def operations(
    *,
    device: DevicesOption = None,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    seed: SeedOption = 0,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time operations and layers of networks, forward and with gradient."""
    output, options = (runs, json_, compare, tolerance), {"quick": quick, "seed": seed}
    _run("operations.benchmark_operations", output, _devices(device), **options)


@verbs.command("step")
def step(
    config: console.ConfigArgument = console.DEFAULT_CONFIG,
    *,
    device: DevicesOption = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", help="Repeatable; default: 32 to 2048 and the file's own"),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="float32 | mixed_bfloat16 | mixed_float16; repeatable; default: float32 and the "
            'choice of "auto"',
        ),
    ] = None,
    jit_compile: Annotated[
        bool | None,
        typer.Option("--jit-compile/--no-jit-compile", help="With or without XLA; default: both"),
    ] = None,
    set_: console.SetOption = None,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the training step of a configuration, and its parts."""
    loaded = console.load_config(config, set_)
    _check("--batch-size", batch_size)
    _check("--precision", precision, _PRECISIONS)
    options: dict[str, Any] = {"batch_sizes": batch_size or [], "precisions": precision or []}
    options |= {"jit_compile": jit_compile, "quick": quick}
    output = (runs, json_, compare, tolerance)
    _run("step.benchmark_step", output, loaded, _devices(device), **options)


@verbs.command("formats")
def formats(
    run: console.RunArgument = "latest",
    *,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Compare the export formats of a model: size, loading time, speed, accuracy."""
    console.require("cpu", run, runs)
    output = (runs, json_, compare, tolerance)
    _run("formats.benchmark_formats", output, run, runs_directory=runs, quick=quick)


def _check(option: str, values: list[Any] | None, choices: tuple[str, ...] = ()) -> None:
    """Requires values to be among the choices, or positive numbers if there are no choices."""
    for value in values or ():
        if choices and value not in choices:
            raise InputError(f"{option}: unknown {value!r}: {did_you_mean(value, choices)}")
        if not choices and value < 1:
            raise InputError(f"{option}: expected 1 or more, received {value}")


def _devices(words: list[str] | None) -> list[str]:
    """Returns the values of --device, and requires a GPU driver if one names a GPU."""
    for word in words or ():
        console.require(word if word.startswith("gpu") else "cpu")
    return words or []


def _run(
    function: str,
    output: tuple[str, Path | None, Path | None, float],
    *arguments: Any,
    **options: Any,
) -> None:
    """Measures, writes and prints the result, and compares it with the earlier one.

    Args:
        function: The function of the benchmark, as "module.function".
        output: The values of --runs, --json, --compare and --tolerance.
        *arguments: Arguments of the function.
        **options: Keyword arguments of the function.
    """
    from trainer.benchmark.compare import compare, read_document
    from trainer.files import require_writable, write_text

    runs, file, earlier, tolerance = output
    before = None if earlier is None else read_document(earlier)
    require_writable(runs, "--runs")
    if file is not None and file != Path("-"):
        _require_new(file)
    console.start_logging()
    with console.stdout_to_stderr():
        module, name = function.split(".")
        imported = console.import_module(f"trainer.benchmark.{module}")
        result = getattr(imported, name)(*arguments, **options)
        folder = result.write(runs)
    if file == Path("-"):
        console.print_line(result.json(), end="")
    else:
        if file is not None:
            write_text(file, result.json())
        titles, *rows = result.table()
        console.print_line(result.subject)
        console.print_rows(rows, titles=titles)
        console.print_line("\n".join(result.lines()))
        console.print_run(folder, tensorboard=True)
    if before is not None:
        for line in compare(before, result.document(), tolerance=tolerance):
            console.print_line(line, err=True)


def _require_new(file: Path) -> None:
    """Requires that a file does not exist and can be written, before the measurement starts."""
    try:
        file.touch(exist_ok=False)
        file.unlink()
    except FileExistsError:
        message = f"--json: {file} exists already and is not overwritten: use another name"
        raise InputError(message) from None
    except OSError as error:
        raise InputError(f"--json: {file} cannot be written: {error.strerror}") from None
