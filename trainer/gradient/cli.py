"""The verb of the gradient tool: gradient."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from trainer.console import (
    JsonOption,
    RunsOption,
    import_module,
    load_config,
    print_json,
    print_line,
    print_rows,
    print_run,
    start_logging,
    stdout_to_stderr,
)
from trainer.errors import CheckError, InputError, did_you_mean

app = typer.Typer()


class _ExpressionCommand(typer.core.TyperCommand):
    """A command whose argument may begin with a minus: only `--word` is an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses unknown options; click takes them for arguments by `ignore_unknown_options`."""
        known = [name for option in self.get_params(ctx) for name in option.opts]
        for arg in args[: args.index("--")] if "--" in args else args:
            name = arg.partition("=")[0]
            if re.fullmatch("--[A-Za-z-]+", name) and name not in known:
                options = [name for name in known if name.startswith("--")]
                raise InputError(f"there is no option {name}: {did_you_mean(name, options)}")
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
    start_logging()
    with stdout_to_stderr():
        if model is None:
            derive = import_module("trainer.gradient.comparison").derive
            result: Any = derive(expression, at=at, wrt=wrt, order=order)
        else:
            check = import_module("trainer.gradient.network").check
            result = check(load_config(model, None))
        folder = result.write(runs)
    _print_gradient(result, folder, as_json=json_)
    if not result.passed:
        raise CheckError(result.verdict)


def _print_gradient(result: Any, folder: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(result.document() | {"run": str(folder)})
        return
    rows = result.table()
    print_line(result.title)
    print_rows((row.values() for row in rows), titles=rows[0])
    for line in result.lines:
        print_line(line)
    print_run(folder, tensorboard=(folder / "tensorboard").is_dir())
