"""The verb of the serving tool: serve."""

from pathlib import Path
from typing import Annotated

import typer

from trainer import console

app = typer.Typer()


@app.command(**console.in_help("trainer serve digits", console.KEEP))
def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An exported model or its folder")],
    *,
    directory: Annotated[
        str, typer.Option("--directory", help="Folder of the exported models")
    ] = "saved_models",
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8501,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", min=1, help="Largest body of a request, in bytes")
    ] = 16_000_000,
    trust: console.TrustOption = False,
) -> None:
    """Serve an exported model over HTTP.

    The API is TensorFlow Serving's REST API.
    """
    console.start_logging()
    run = console.import_module("trainer.serving.server").serve
    run(name, Path(directory), (host, port), max_body_bytes=max_body_bytes, trust=trust)
