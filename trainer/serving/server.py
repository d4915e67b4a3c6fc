"""Finds an exported model and serves it until the process is stopped."""

import gc
import logging
import os
import socket
from pathlib import Path
from urllib.parse import quote

from trainer.errors import InputError, did_you_mean, require_packages
from trainer.saving.versions import is_version, list_versions, read_record

_logger = logging.getLogger(__name__)

_BACKLOG = 512


def serve(
    name: str,
    *,
    directory: str = "saved_models",
    host: str = "127.0.0.1",
    port: int = 8501,
    max_body_bytes: int = 16_000_000,
    trust: bool = False,
) -> None:
    """Serves the newest version of an exported model until a signal stops the process.

    Args:
        name: Name of the model, its folder, or one version folder, to serve only that version.
        directory: Folder of the exported models.
        host: Address to listen on. The default accepts only connections from this machine.
        port: Port to listen on; 0: any free port.
        max_body_bytes: Largest accepted body of a request, after decompression.
        trust: Accept any operation in the SavedModel.

    Raises:
        InputError: There is no such model, it cannot be served, or the address is in use.
        MissingError: The web framework is not installed.
    """
    require_packages("trainer serve", ("starlette", "uvicorn"), extra="serve")
    folder = _find_model(name, Path(directory))
    with listen(host, port) as listening:
        from trainer.serving.app import make_server
        from trainer.serving.servable import Servables

        model = folder.parent if is_version(folder) else folder
        servables = Servables(model.name, folder, trust=trust)
        # Parsing requests makes many small lists. Without this, Python's garbage collector scans
        # all objects of TensorFlow again and again meanwhile: 200 ms each time.
        gc.freeze()
        address, port = listening.getsockname()[:2]
        _logger.info(
            "%s, version %d, is served at http://%s:%d (a page to draw on; "
            "POST /v1/models/%s:predict); control-C stops it",
            *(model.name, servables.newest.version),
            *(f"[{address}]" if ":" in address else address, port, quote(model.name)),
        )
        make_server(servables, max_body_bytes=max_body_bytes).run(sockets=[listening])


def _find_model(name: str, directory: Path) -> Path:
    """Returns the folder of a model, or of one version."""
    try:
        paths = [path for path in (directory / name, Path(name)) if name and path.is_dir()]
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    for path in paths:
        # Without "." and "..": the last part must be the name of the folder.
        folder = Path(os.path.normpath(path.absolute()))
        if versions := list_versions(folder):
            record = read_record(versions[max(versions)])
            if record is not None and record.format != "saved_model":
                raise InputError(
                    f"{folder} contains {record.format}: `trainer serve` needs a SavedModel, made "
                    "by `trainer export RUN --format saved_model`"
                )
            return folder
    known = [path.name for path in directory.glob("*") if list_versions(path)]
    available = did_you_mean(name, known) if known else "none exists: `trainer export` makes one"
    raise InputError(f"there is no exported model {name!r} in {directory}: {available}")


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket before anything slow starts.

    Args:
        host: A name or an address of this machine.
        port: 0: any free port.

    Raises:
        InputError: The address is in use, or does not belong to this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host}, port {port}: {reason}") from None
    # Connections inherit this. Without it, the delay of small packets turns a response of 1 ms
    # into 45 ms. asyncio sets it only for sockets made with the number of the protocol.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
