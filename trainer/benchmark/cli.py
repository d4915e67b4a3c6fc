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
BatchSizesOption = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Repeatable; default: 32 to 2048 and the file's own"),
]
PrecisionsOption = Annotated[
    list[str] | None,
    typer.Option(help=f'{" | ".join(_PRECISIONS)}; repeatable; default: float32 and "auto"'),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Measure less, in under a minute")]
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
    seed: SeedOption = 0,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time matrix products of growing size on every device."""
    if textbook and (shape or dtype):
        raise InputError("--textbook cannot be combined with --shape or --dtype")
    shapes, dtypes = _choose("--shape", shape, _SHAPES), _choose("--dtype", dtype, _DTYPES)
    products = {"dot": ["float32"]} if textbook else dict.fromkeys(shapes, dtypes)
    options = {"largest": largest, "textbook": textbook, "quick": quick, "seed": seed}
    _run("matmul", runs, json_, words=device, products=products, **options)


@verbs.command("operations")
def operations(
    *,
    device: DevicesOption = None,
    quick: QuickOption = False,
    seed: SeedOption = 0,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time operations and layers of networks, forward and with gradient."""
    _run("operations", runs, json_, words=device, quick=quick, seed=seed)


@verbs.command("step")
def step(
    config: console.ConfigArgument = console.DEFAULT_CONFIG,
    *,
    device: DevicesOption = None,
    batch_size: BatchSizesOption = None,
    precision: PrecisionsOption = None,
    jit_compile: Annotated[bool | None, typer.Option(help="Use XLA or not; default: both")] = None,
    set_: console.SetOption = None,
    quick: QuickOption = False,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Time the training step of a configuration, and its parts."""
    loaded = console.load_config(config, set_)
    precision = precision and _choose("--precision", precision, _PRECISIONS)
    options = {"precisions": precision, "jit_compile": jit_compile, "quick": quick}
    _run("step", runs, json_, config=loaded, words=device, batch_sizes=batch_size, **options)


@verbs.command("formats")
def formats(
    run: console.RunArgument = "latest",
    *,
    quick: QuickOption = False,
    runs: console.RunsOption = "runs",
    json_: JsonFileOption = None,
) -> None:
    """Compare the export formats of a model: size, loading time, speed, accuracy."""
    console.require("cpu", run, runs)
    _run("formats", runs, json_, reference=run, runs_directory=runs, quick=quick)


def _choose(option: str, values: list[str] | None, choices: tuple[str, ...]) -> list[str]:
    """Returns the values of an option, by default all choices."""
    for value in values or ():
        expect(value in choices, option, " or ".join(choices), repr(value))
    return values or [*choices]


def _run(name: str, runs: str, file: Path | None, **options: Any) -> None:
    """Measures, writes and prints the result.

    Args:
        name: The name of the benchmark.
        runs: The value of --runs.
        file: The value of --json.
        **options: The arguments of its function. A GPU among the "words" needs a driver.
    """
    from trainer.files import require_writable, write_text

    for word in options.get("words") or ():
        console.require(word if word.startswith("gpu") else "cpu")
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
