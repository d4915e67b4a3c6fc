"""The verbs of `trainer benchmark`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer import console
from trainer.errors import InputError, expect

app = typer.Typer()
verbs = typer.Typer(help="Time operations, steps and exported models.", no_args_is_help=True)
app.add_typer(verbs, name="benchmark", rich_help_panel=console.MEASURE)

_SHAPES, _DTYPES = ("dot", "square"), ("float32", "bfloat16", "float16")
_PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

DevicesOption = Annotated[
    list[str] | None,
    typer.Option("--device", help="cpu | cpu:N | gpu | gpu:N | all; repeatable; default: all"),
]
BatchSizesOption = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Repeatable; default: 32 to 2048 and the file's own"),
]
PrecisionsOption = Annotated[
    list[str] | None,
    typer.Option(help=f'{" | ".join(_PRECISIONS)}; repeatable; default: float32 and "auto"'),
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


@verbs.command("matmul", **console.in_help("trainer benchmark matmul --quick"))
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
    products = {"dot": ["float32"]} if textbook else dict.fromkeys(shapes, dtypes)
    options = {"largest": largest, "textbook": textbook, "quick": quick, "seed": seed}
    output = (runs, json_, compare, tolerance)
    _run("matmul", output, words=device, products=products, **options)


@verbs.command("operations", **console.in_help("trainer benchmark operations --quick"))
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
    _run("operations", (runs, json_, compare, tolerance), words=device, quick=quick, seed=seed)


@verbs.command(
    "step", **console.in_help("trainer benchmark step configs/mnist_mlp.toml --batch-size 128")
)
def step(
    config: console.ConfigArgument = console.DEFAULT_CONFIG,
    *,
    device: DevicesOption = None,
    batch_size: BatchSizesOption = None,
    precision: PrecisionsOption = None,
    jit_compile: Annotated[bool | None, typer.Option(help="Use XLA or not; default: both")] = None,
    set_: console.SetOption = None,
    quick: QuickOption = False,
    compare: CompareOption = None,
    tolerance: ToleranceOption = 0.1,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the training step of a configuration, and its parts."""
    loaded, output = console.load_config(config, set_), (runs, json_, compare, tolerance)
    precision = precision and _choose("--precision", precision, _PRECISIONS)
    options = {"precisions": precision, "jit_compile": jit_compile, "quick": quick}
    _run("step", output, config=loaded, words=device, batch_sizes=batch_size, **options)


@verbs.command("formats", **console.in_help("trainer benchmark formats latest"))
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
    _run("formats", output, reference=run, runs_directory=runs, quick=quick)


def _choose(option: str, values: list[str] | None, choices: tuple[str, ...]) -> list[str]:
    """Returns the values of an option, by default all choices."""
    for value in values or ():
        expect(value in choices, option, " or ".join(choices), repr(value))
    return values or [*choices]


def _run(name: str, output: tuple[str, Path | None, Path | None, float], **options: Any) -> None:
    """Measures, writes and prints the result, and compares it with the earlier one.

    Args:
        name: The name of the benchmark.
        output: The values of --runs, --json, --compare and --tolerance.
        **options: The arguments of its function. A GPU among the "words" needs a driver.
    """
    from trainer.benchmark.compare import compare, read_document
    from trainer.files import require_writable, write_text

    for word in options.get("words") or ():
        console.require(word if word.startswith("gpu") else "cpu")
    runs, file, earlier, tolerance = output
    before = None if earlier is None else read_document(earlier)
    require_writable(runs, "--runs")
    if file is not None and file != Path("-"):
        file.touch(exist_ok=False)  # an OSError now, not after minutes
        file.unlink()
    console.start_logging()
    with console.stdout_to_stderr():
        module = console.import_module(f"trainer.benchmark.{name}")
        result = getattr(module, f"benchmark_{name}")(**options)
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
