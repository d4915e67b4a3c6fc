"""The verb of the serving tool: serve."""

from typing import Annotated

import typer

from trainer.console import (
    import_module,
    start_logging,
)

app = typer.Typer()


@app.command()
def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An exported model or its folder")],
    *,
    directory: Annotated[
        str, typer.Option("--directory", help="Folder that holds exported models")
    ] = "saved_models",
    host: Annotated[str, typer.Option(help="Address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8501,
    most_bytes: Annotated[
        int, typer.Option("--most-bytes", min=1, help="The largest body of a request")
    ] = 16_000_000,
    trust: Annotated[
        bool, typer.Option("--trust", help="Accept any operation in it: know its maker")
    ] = False,
) -> None:
    """Serve an exported model over HTTP, as TensorFlow Serving does."""
    start_logging()
    run_server = import_module("trainer.serving.server").serve
    run_server(name, directory=directory, host=host, port=port, most_bytes=most_bytes, trust=trust)
