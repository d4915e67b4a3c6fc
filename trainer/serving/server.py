"""Runs the web application until it is stopped."""

import gc
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from trainer.errors import InputError, did_you_mean, require_packages
from trainer.saving.export import is_version, read_facts, versions

if TYPE_CHECKING:
    from trainer.serving.servable import Servables

_logger = logging.getLogger(__name__)

_BACKLOG = 512


def serve(
    name: str,
    *,
    directory: str = "saved_models",
    host: str = "127.0.0.1",
    port: int = 8501,
    most_bytes: int = 16_000_000,
    trust: bool = False,
) -> None:
    """Serves the newest version of an exported model until a signal stops it.

    Args:
        name: Name of the model, as `trainer export` published it, its folder, or the folder of one
            version, which is then the only one.
        directory: Folder that holds exported models.
        host: Address to listen at; the default lets nobody else in.
        port: To listen at; 0 for any that is free.
        most_bytes: The largest body of a request.
        trust: Accept any operation in the SavedModel.

    Raises:
        InputError: There is no such model, it cannot be served, or the address is taken.
        MissingError: The web framework is not installed.
    """
    require_packages("trainer serve", ("starlette", "uvicorn"), extra="serve")
    folder = _find_model(name, Path(directory))
    with listen(host, port) as listening:
        from trainer.serving.app import make_server
        from trainer.serving.servable import Servables

        model = folder.parent if is_version(folder) else folder
        servables = Servables(model.name, folder, trust=trust)
        # Requests are made of many small lists. Without this, Python's collector looks through all
        # of TensorFlow's objects again and again while it reads them: 200 ms each time.
        gc.freeze()
        _say_where(servables, listening)
        make_server(servables, most_bytes=most_bytes).run(sockets=[listening])


def _say_where(servables: "Servables", listening: socket.socket) -> None:
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    _logger.info(
        "%s, version %d, is served at http://%s:%d (a page to draw on; "
        "POST /v1/models/%s:predict); control-C ends it",
        *(servables.name, servables.newest.version, shown, port, quote(servables.name)),
    )


def _find_model(name: str, directory: Path) -> Path:
    """Returns the folder of a model, or of one version, that has a SavedModel to serve."""
    try:
        paths = [path for path in (directory / name, Path(name)) if name and path.is_dir()]
        # Without "." and "..", so that the last part is the name of the folder.
        folders = [Path(os.path.normpath(path.absolute())) for path in paths]
        folder = next((path for path in folders if is_version(path) or versions(path)), None)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if folder is None:
        known = [path.name for path in directory.glob("*") if versions(path)]
        there = did_you_mean(name, known) if known else "none is there: `trainer export` makes one"
        raise InputError(f"there is no exported model {name!r} in {directory}: {there}")
    found = versions(folder)
    newest = folder if is_version(folder) else found[max(found)]
    if not (newest / "saved_model.pb").is_file():
        kind = read_facts(newest).format if (newest / "export.json").is_file() else "no SavedModel"
        raise InputError(
            f"{newest} holds {kind}: `trainer serve` takes a SavedModel, as "
            "`trainer export RUN --format saved_model` makes it"
        )
    return folder


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, before anything slow has started.

    Args:
        host: A name or an address of this machine.
        port: 0 for any that is free.

    Raises:
        InputError: It is taken, or not of this machine.
    """
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With the protocol named: asyncio turns off the delay of small packets only where it is,
        # and that delay makes 1 ms of work an answer after 45.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        if listening is not None:
            listening.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen at {host}, port {port}: {reason}") from None
    return listening
