"""The command `trainer new`: creates a project from a copy of this repository."""

from pathlib import Path
from typing import Annotated

import typer

from trainer import console

app = typer.Typer()


@app.command(**console.in_help("trainer new ../birds --name birds --data pictures", console.KEEP))
def new(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A new or empty folder")],
    *,
    name: Annotated[str, typer.Option(help="Name of the package and of the command")],
    without: Annotated[str, typer.Option(metavar="TOOL,...", help="Tools to leave out")] = "",
    data: Annotated[Path | None, typer.Option(help="Images: a folder, a .csv or .npz file")] = None,
) -> None:
    """Create a project of your own from this repository."""
    from trainer.new.project import create_project

    removed = [tool for tool in without.replace(" ", "").split(",") if tool]
    if hint := create_project(directory, name, removed, data):
        console.print_line(hint, err=True)
    console.print_line(f"created {directory}: run `make fit` there; settings: configs/{name}.toml")
