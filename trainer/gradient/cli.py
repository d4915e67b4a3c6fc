"""The command `trainer gradient`: prints a result and writes its directory.

runs/<UTC time>-gradient/
    gradient.json    all numbers
    events.out.*     for TensorBoard: the table as text and, for an expression, the recorded graph
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer import console
from trainer.errors import CheckError, InputError
from trainer.files import write_text

app = typer.Typer()


# Without `ignore_unknown_options`, an expression that begins with a minus sign would be an option.
@app.command(
    context_settings={"ignore_unknown_options": True},
    **console.in_help(
        "trainer gradient 'a*w**2 + b*w + c' --at a=1,b=4,c=6,w=3 --wrt w", console.MEASURE
    ),
)
def gradient(
    expression: Annotated[
        str | None, typer.Argument(metavar="EXPR", help='For example "a*w**2 + sin(w)"')
    ] = None,
    *,
    at: Annotated[
        str | None, typer.Option("--at", metavar="NAME=NUMBER,...", help="a=1,w=-0.5")
    ] = None,
    wrt: Annotated[
        str | None, typer.Option("--wrt", metavar="NAME,...", help="Variables to differentiate by")
    ] = None,
    order: Annotated[int, typer.Option(help="Order of the derivative, 1 to 4")] = 1,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="CONFIG", help="Check the network of a TOML file instead"),
    ] = None,
    runs: console.RunsOption = "runs",
    json_: console.JsonOption = False,
) -> None:
    """Compare gradients of an expression, or of a network.

    Three methods compute them: automatic, symbolic or exact, and finite differences.
    """
    if model is not None and (expression, at, wrt, order) != (None, None, None, 1):
        raise InputError("--model uses the network's loss: expected no EXPR, --at, --wrt, --order")
    console.start_logging()
    with console.stdout_to_stderr():
        console.import_module("tensorflow")  # without its messages
        if model is None:
            derive = console.import_module("trainer.gradient.comparison").derive
            result: Any = derive(expression, at=at, wrt=wrt, order=order)
        else:
            result = console.import_module("trainer.gradient.network").check(
                console.load_config(model, None)
            )
        folder = _write(result, runs)
    if json_:
        console.print_json(result.document | {"run": str(folder)})
    else:
        console.print_line(result.title)
        console.print_rows((row.values() for row in result.table), titles=result.table[0])
        for line in (result.verdict, *result.document["notes"]):
            console.print_line(line)
        console.print_run(folder, tensorboard=True)
    if not result.passed:
        raise CheckError(result.verdict)


def _write(result: Any, runs: str) -> Path:
    """Writes a GradientResult to a new run directory in the folder `runs`, and returns its path."""
    import tensorflow as tf

    from trainer.report import markdown_table
    from trainer.run import make_directory

    path = make_directory(runs, "gradient")
    write_text(path / "gradient.json", json.dumps(result.document, indent=2) + "\n")
    table = markdown_table([result.table[0], *map(dict.values, result.table)])
    lines = (f"`{line}`" for line in (result.title, result.verdict, *result.document["notes"]))
    with tf.summary.create_file_writer(str(path)).as_default(step=0):
        tf.summary.text("gradient", "\n\n".join((table, *lines)))
        if result.graph is not None:
            tf.summary.graph(result.graph)
    return path
