"""The verbs of `trainer benchmark`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer import console
from trainer.errors import InputError, expect

app = typer.Typer()
verbs = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(verbs, name="benchmark")

_SHAPES, _DTYPES = ("dot", "square"), ("float32", "bfloat16", "float16")
_PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

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


@verbs.command("matmul")
def matmul(
    *,
    device: DevicesOption = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="dot | square; repeatable; default: both")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 | bfloat16 | float16; repeatable; default: all"),
    ] = None,
    largest: Annotated[int | None, typer.Option(min=1, help="The largest n")] = None,
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
    shapes, dtypes = _choose("--shape", shape, _SHAPES), _choose("--dtype", dtype, _DTYPES)
    options = {
        "words": device,
        "products": {"dot": ["float32"]} if textbook else dict.fromkeys(shapes, dtypes),
        "largest": largest,
        "textbook": textbook,
        "quick": quick,
        "seed": seed,
    }
    _run("matmul.benchmark_matmul", options, (runs, json_, compare, tolerance))


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
    options = {"words": device, "quick": quick, "seed": seed}
    _run("operations.benchmark_operations", options, (runs, json_, compare, tolerance))


@verbs.command("step")
def step(
    config: console.ConfigArgument = console.DEFAULT_CONFIG,
    *,
    device: DevicesOption = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Repeatable; default: 32 to 2048 and the file's own"),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="float32 | mixed_bfloat16 | mixed_float16; repeatable; default: float32 and the "
            'choice of "auto"',
        ),
    ] = None,
    jit_compile: Annotated[bool | None, typer.Option(help="Use XLA or not; default: both")] = None,
    set_: console.SetOption = None,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the training step of a configuration, and its parts."""
    options = {
        "config": console.load_config(config, set_),
        "words": device,
        "batch_sizes": batch_size,
        "precisions": precision and _choose("--precision", precision, _PRECISIONS),
        "jit_compile": jit_compile,
        "quick": quick,
    }
    _run("step.benchmark_step", options, (runs, json_, compare, tolerance))


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
    options = {"reference": run, "runs_directory": runs, "quick": quick}
    _run("formats.benchmark_formats", options, (runs, json_, compare, tolerance))


def _choose(option: str, values: list[str] | None, choices: tuple[str, ...]) -> list[str]:
    """Returns the values of an option, by default all choices."""
    for value in values or ():
        expect(value in choices, option, " or ".join(choices), repr(value))
    return values or [*choices]


def _run(
    function: str, options: dict[str, Any], output: tuple[str, Path | None, Path | None, float]
) -> None:
    """Measures, writes and prints the result, and compares it with the earlier one.

    Args:
        function: The function of the benchmark, as "module.function".
        options: Its arguments. A GPU among the "words", the values of --device, needs a driver.
        output: The values of --runs, --json, --compare and --tolerance.
    """
    from trainer.benchmark.compare import compare, read_document
    from trainer.files import require_writable, write_text

    for word in options.get("words") or ():
        console.require(word if word.startswith("gpu") else "cpu")
    runs, file, earlier, tolerance = output
    before = None if earlier is None else read_document(earlier)
    require_writable(runs, "--runs")
    if file is not None and file != Path("-"):
        try:
            file.touch(exist_ok=False)
            file.unlink()
        except OSError as error:
            raise InputError(f"--json: {file} cannot be written: {error.strerror}") from None
    console.start_logging()
    with console.stdout_to_stderr():
        module, name = function.split(".")
        imported = console.import_module(f"trainer.benchmark.{module}")
        result = getattr(imported, name)(**options)
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
