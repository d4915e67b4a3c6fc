"""The verbs of the saving tool: save, load, export, verify."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.console import (
    JsonOption,
    RunArgument,
    RunsOption,
    import_module,
    print_table,
    require,
    start_logging,
    stdout_to_stderr,
)

app = typer.Typer()


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
    require("cpu", run, runs)
    start_logging()
    with stdout_to_stderr():
        result = import_module("trainer.saving.files").save(
            run, path, overwrite=overwrite, runs_directory=runs
        )
    print_table(result, as_json=json_)


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
    start_logging()
    with stdout_to_stderr():
        loaded = import_module("trainer.saving.loading").load(path, trust=trust)
        result = loaded.facts() | (loaded.evaluate() if evaluate else {})
    print_table(result, as_json=json_)


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
    require("cpu", run, runs)
    start_logging()
    with stdout_to_stderr():
        folder, exported = import_module("trainer.saving.export").export(
            run, format_, name=name, directory=directory, runs_directory=runs
        )
    verified = exported.verified.model_dump()
    print_table({"path": str(folder), "format": exported.format, **verified}, as_json=json_)


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
    start_logging()
    with stdout_to_stderr():
        folder, verified = import_module("trainer.saving.export").verify(path, trust=trust)
    result = {"result": "unchanged, and the same answers to the images kept with it"}
    print_table({"path": str(folder), **result, **verified.model_dump()}, as_json=json_)
