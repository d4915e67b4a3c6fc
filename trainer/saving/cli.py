"""The verbs of the saving tool: save, load, export, verify."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.console import (
    JsonOption,
    RunArgument,
    RunsOption,
    TrustOption,
    import_module,
    print_table,
    require,
    start_logging,
    stdout_to_stderr,
)
from trainer.saving import PUBLIC

app = typer.Typer()


def _call(verb: str, *arguments: Any, **options: Any) -> Any:
    """Calls the function of a verb, which imports TensorFlow. Its prints go to stderr."""
    start_logging()
    with stdout_to_stderr():
        return getattr(import_module(PUBLIC[verb]), verb)(*arguments, **options)


@app.command()
def save(
    run: RunArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new file, name.keras")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file")] = False,
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Write the model of a run into one Keras file."""
    require("cpu", run, runs)
    result = _call("save", run, path, overwrite=overwrite, runs_directory=runs)
    print_table(result, as_json=json_)


@app.command()
def load(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, saved or exported model")],
    *,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Score its test images")] = False,
    trust: TrustOption = False,
    json_: JsonOption = False,
) -> None:
    """Print format, input, output, size and origin of a model in any format."""
    loaded = _call("load", path, trust=trust)
    with stdout_to_stderr():
        result = loaded.describe() | (loaded.evaluate() if evaluate else {})
    print_table(result, as_json=json_)


@app.command()
def export(
    run: RunArgument,
    *,
    format_: Annotated[
        str, typer.Option("--format", help="saved_model | litert | litert_int8 | onnx")
    ] = "saved_model",
    name: Annotated[
        str | None, typer.Option(help="Name of the model (default: data-network)")
    ] = None,
    directory: Annotated[str, typer.Option(help="Folder of the exported models")] = "saved_models",
    runs: RunsOption = "runs",
    json_: JsonOption = False,
) -> None:
    """Write a new version of a model for deployment, verified in another process."""
    require("cpu", run, runs)
    options = {"name": name, "directory": directory, "runs_directory": runs}
    folder, record = _call("export", run, format_, **options)
    facts = {"path": str(folder), "format": record.format, **record.verified.model_dump()}
    print_table(facts, as_json=json_)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An exported model or a version")],
    *,
    trust: TrustOption = False,
    json_: JsonOption = False,
) -> None:
    """Check an exported model: its checksums, and its predictions in another process."""
    folder, verified = _call("verify", path, trust=trust)
    result = "unchanged, and the same predictions for the stored images"
    facts = {"path": str(folder), "result": result, **verified.model_dump()}
    print_table(facts, as_json=json_)
