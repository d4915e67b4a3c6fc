"""Finds an exported model and serves it until the process is stopped."""

import gc
import logging
import os
import socket
from pathlib import Path

from trainer.errors import InputError, did_you_mean, require_packages
from trainer.saving.versions import list_versions

_logger = logging.getLogger(__name__)


def serve(
    name: str, directory: Path, address: tuple[str, int], *, max_body_bytes: int, trust: bool
) -> None:
    """Serves an exported model until a signal stops the process. Its verb describes the options.

    Raises:
        InputError: There is no such model, it cannot be served, or the address is in use.
        MissingError: The web framework is not installed.
    """
    require_packages("trainer serve", ("starlette", "uvicorn"), extra="serve")
    folder = _find_model(name, directory)
    host, port = address
    try:  # before anything slow starts
        listening = socket.create_server(address)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from None
    # Connections inherit these options. Without the first, the delay of small packets turns a
    # response of 1 ms into 45 ms. The second closes connections of clients that have vanished.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with listening:
        from trainer.serving.app import make_server
        from trainer.serving.servable import Servables

        servables = Servables(folder, trust=trust)
        # Parsing requests makes many small lists. Without this, Python's garbage collector scans
        # all objects of TensorFlow again and again meanwhile: 200 ms each time.
        gc.freeze()
        newest = servables.newest
        _logger.info(
            "%s, version %d, is served at http://%s:%d (a page to draw on); control-C stops it",
            *(newest.name, newest.version, host, listening.getsockname()[1]),
        )
        make_server(servables, max_body_bytes=max_body_bytes).run(sockets=[listening])


def _find_model(name: str, directory: Path) -> Path:
    """Returns the folder of a model, or of one version."""
    for path in (directory / name, Path(name)):
        # Without "." and "..": the last part must be the name of the folder.
        folder = Path(os.path.normpath(path.absolute()))
        if os.access(path, os.R_OK) and list_versions(folder):
            return folder
    known = [path.name for path in directory.glob("*") if list_versions(path)]
    available = did_you_mean(name, known) if known else "none exists: `trainer export` makes one"
    raise InputError(f"there is no exported model {name!r} in {directory}: {available}")
