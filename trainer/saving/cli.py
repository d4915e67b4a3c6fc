"""The verbs of the saving tool: save, load, export, verify."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trainer import console
from trainer.saving import PUBLIC

app = typer.Typer()


def _call(verb: str, *arguments: Any, **options: Any) -> Any:
    """Calls the function of a verb, which imports TensorFlow. Its prints go to stderr."""
    console.start_logging()
    with console.stdout_to_stderr():
        return getattr(console.import_module(PUBLIC[verb]), verb)(*arguments, **options)


@app.command(**console.in_help("trainer save latest digits.keras", console.KEEP))
def save(
    run: console.RunArgument,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new file, name.keras")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file")] = False,
    runs: console.RunsOption = "runs",
    json_: console.JsonOption = False,
) -> None:
    """Write the model of a run into one Keras file."""
    console.require("cpu", run, runs)
    result = _call("save", run, path, overwrite=overwrite, runs_directory=runs)
    console.print_table(result, as_json=json_)


@app.command(**console.in_help("trainer load digits.keras", console.KEEP))
def load(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A run, saved or exported model")],
    *,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Score its test images")] = False,
    trust: console.TrustOption = False,
    json_: console.JsonOption = False,
) -> None:
    """Describe a model in any format.

    Prints format, input, output, size and origin.
    """
    loaded = _call("load", path, trust=trust)
    with console.stdout_to_stderr():
        result = loaded.describe() | (loaded.evaluate() if evaluate else {})
    console.print_table(result, as_json=json_)


@app.command(**console.in_help("trainer export latest --name digits --format litert", console.KEEP))
def export(
    run: console.RunArgument,
    *,
    format_: Annotated[
        str, typer.Option("--format", help="saved_model | litert | litert_int8 | onnx")
    ] = "saved_model",
    name: Annotated[
        str | None, typer.Option(help="Name of the model (default: data-network)")
    ] = None,
    directory: Annotated[str, typer.Option(help="Folder of the exported models")] = "saved_models",
    runs: console.RunsOption = "runs",
    json_: console.JsonOption = False,
) -> None:
    """Write a verified new version of a model for deployment.

    Another process computes its predictions again before it is published.
    """
    console.require("cpu", run, runs)
    options = {"name": name, "directory": directory, "runs_directory": runs}
    folder, record = _call("export", run, format_, **options)
    facts = {"path": str(folder), "format": record.format, **record.verified.model_dump()}
    console.print_table(facts, as_json=json_)


@app.command(**console.in_help("trainer verify saved_models/digits/1", console.KEEP))
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An exported model or a version")],
    *,
    trust: console.TrustOption = False,
    json_: console.JsonOption = False,
) -> None:
    """Check an exported model.

    Its checksums, and its predictions in another process.
    """
    folder, verified = _call("verify", path, trust=trust)
    result = "unchanged, and the same predictions for the stored images"
    facts = {"path": str(folder), "result": result, **verified.model_dump()}
    console.print_table(facts, as_json=json_)
