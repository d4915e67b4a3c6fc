"""The command `trainer gradient`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from trainer import cli as console
from trainer.cli import JsonOption, RunsOption
from trainer.errors import CheckError, InputError, nearest

app = typer.Typer()


class _ExpressionCommand(typer.core.TyperCommand):
    """A command whose argument can begin with a minus sign: only `--word` is an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses unknown options, which click accepts because of `ignore_unknown_options`."""
        known = [
            name for option in self.get_params(ctx) for name in option.opts if name[:2] == "--"
        ]
        for arg in args[: args.index("--")] if "--" in args else args:
            name = arg.partition("=")[0]
            if re.fullmatch("--[A-Za-z-]+", name) and name not in known:
                raise InputError(f"there is no option {name}: {nearest(name, known)}")
        return super().parse_args(ctx, args)


@app.command(cls=_ExpressionCommand, context_settings={"ignore_unknown_options": True})
def gradient(
    expression: Annotated[
        str | None,
        typer.Argument(metavar="EXPR", help="An expression of numbers, vectors and matrices"),
    ] = None,
    *,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="NAME=VALUE,...", help="a=1,x=[1,2],A=[[1,2],[3,4]]"),
    ] = None,
    wrt: Annotated[
        str | None, typer.Option("--wrt", metavar="NAME,...", help="Variables to differentiate by")
    ] = None,
    order: Annotated[int, typer.Option(help="Order of the derivative, 1 to 4")] = 1,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="CONFIG", help="Check the network of a TOML file instead"),
    ] = None,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Differentiate an expression by three methods, or check the gradients of a network."""
    if model is not None and (expression, at, wrt, order) != (None, None, None, 1):
        raise InputError("--model uses the network's loss: expected no EXPR, --at, --wrt, --order")
    console._start_logging()
    with console._stdout_for_the_result(), console._without_chatter():
        if model is None:
            derive = console._import("trainer.gradient.comparison").derive
            result: Any = derive(expression, at=at, wrt=wrt, order=order)
        else:
            check = console._import("trainer.gradient.network").check
            result = check(console._load(model, None))
        folder = result.write(runs)
    if json_:
        console._print_json(result.document | {"run": str(folder)})
    else:
        console._print(result.title)
        console._print_rows((row.values() for row in result.table), titles=result.table[0])
        for line in (result.verdict, *result.notes):
            console._print(line)
        console._print_kept(folder, tensorboard=True)
    if not result.passed:
        raise CheckError(result.verdict)
