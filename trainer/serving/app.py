"""The web application: TensorFlow Serving's REST interface, health, and a page to draw on."""

import asyncio
import contextlib
import gzip
import io
import json
import logging
import zlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import tensorflow as tf
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from trainer import keras_objects
from trainer.serving.batching import Batcher
from trainer.serving.messages import (
    DEFAULT_SIGNATURE,
    IMAGE_FILES,
    RequestError,
    parse_request,
    render_answer,
)
from trainer.serving.protocol import Protocol
from trainer.serving.servable import Servable, Servables

_logger = logging.getLogger(__name__)

_SECONDS_TO_LOOK = 1.0  # between two looks for a new version
_FEW_BYTES = 100_000  # are read in less time than another thread takes to wake up and do it
_SECONDS_TO_SEND = 30.0  # that a client has for the body of a request
_SECONDS_TO_FINISH = 10  # that running requests have when the server is stopped


class _Name(StringConvertor):
    regex = "[^/:]+"


class _Number(StringConvertor):
    regex = "[0-9]{1,255}"  # as many digits as the name of a folder can have


register_url_convertor("name", _Name())
register_url_convertor("number", _Number())


def make_server(servables: Servables, *, most_bytes: int) -> uvicorn.Server:
    """Makes the server; `run` it with a socket.

    Args:
        servables: The versions of the model.
        most_bytes: The largest body of a request.
    """
    config = uvicorn.Config(
        make_app(servables, most_bytes=most_bytes),
        http=Protocol,
        log_config=None,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    return uvicorn.Server(config)


def make_app(servables: Servables, *, most_bytes: int) -> Starlette:
    """Makes the application.

    Args:
        servables: The versions of the model.
        most_bytes: The largest body of a request.
    """
    answers = _Answers(servables, most_bytes)
    model = "/v1/models/{name:name}"
    routes = [Route("/", answers.page), Route("/health", answers.health)]
    for prefix in (model, model + "/versions/{version:number}"):
        routes += [
            Route(f"{prefix}:predict", answers.predict, methods=["POST"]),
            Route(f"{prefix}/metadata", answers.metadata),
            Route(prefix, answers.status),
        ]
    handlers: Any = {
        RequestError: _show_request_error,
        HTTPException: _show_http_exception,
        Exception: _show_defect,
    }
    app = Starlette(routes=routes, lifespan=answers.lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class _Json(Response):
    """JSON in ASCII, which holds any text, and with NaN and Infinity, as TensorFlow Serving's."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


class _Answers:
    """What each address answers; long work is done in threads, so that every client is heard."""

    def __init__(self, servables: Servables, most_bytes: int) -> None:
        self._servables = servables
        self._most_bytes = most_bytes
        self._batcher = Batcher()

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Looks for new versions while the server runs."""
        looking = asyncio.create_task(self._look_for_versions())
        yield
        looking.cancel()

    async def predict(self, request: Request) -> Response:
        servable = await self._servable(request)
        body = await _read_body(request, self._most_bytes)
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding in ("gzip", "x-gzip"):
            body = await run_in_threadpool(_decompress, body, self._most_bytes)
        elif encoding != "identity":
            raise RequestError(415, f"Content-Encoding: expected gzip, received {encoding!r}")
        if len(body) <= _FEW_BYTES:
            call = parse_request(body, servable.signatures)
        else:
            call = await run_in_threadpool(parse_request, body, servable.signatures)
        try:
            outputs = await self._batcher.predict(servable, call.signature, call.tensors)
        except tf.errors.InvalidArgumentError as error:
            raise RequestError(400, keras_objects.explain(error)) from error
        return _Json(render_answer(outputs, by_row=call.by_row))

    async def metadata(self, request: Request) -> Response:
        servable = await self._servable(request)
        return _Json(servable.metadata(self._servables.name))

    async def status(self, request: Request) -> Response:
        found = await run_in_threadpool(self._servables.status, _version(request))
        if request.path_params["name"] != self._servables.name or not found:
            raise _not_found(request)
        return _Json({"model_version_status": found})

    async def health(self, _: Request) -> Response:
        name, version = self._servables.name, str(self._servables.newest.version)
        return _Json({"status": "ok", "model": name, "version": version})

    async def page(self, _: Request) -> Response:
        return HTMLResponse(render_page(self._servables))

    async def _servable(self, request: Request) -> Servable:
        found = None
        if request.path_params["name"] == self._servables.name:
            version = _version(request)
            if version is None:
                return self._servables.newest
            # An older version is loaded when it is first asked for.
            found = await run_in_threadpool(self._servables.find, version)
        if found is None:
            raise _not_found(request)
        return found

    async def _look_for_versions(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_TO_LOOK)
            await run_in_threadpool(self._servables.refresh)


def render_page(servables: Servables) -> str:
    """Returns the page to draw on, with what it has to know of the newest version."""
    newest = servables.newest
    images = newest.signatures.get(DEFAULT_SIGNATURE, {}).get("images")
    facts = {
        "name": servables.name,
        "version": newest.version,
        "classes": newest.class_names,
        "shape": None if images is None else images.shape.as_list()[1:],
        "takes_files": any(IMAGE_FILES in inputs for inputs in newest.signatures.values()),
    }
    page = resources.files("trainer.serving").joinpath("page.html").read_text(encoding="utf-8")
    # No "<" of a class name may end the element that the facts are in.
    return page.replace("{{facts}}", json.dumps(facts).replace("<", "\\u003c"))


def _version(request: Request) -> int | None:
    text = request.path_params.get("version")
    return None if text is None else int(text)


def _not_found(request: Request) -> RequestError:
    name, version = request.path_params["name"], _version(request)
    which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return RequestError(404, f"Servable not found for request: {which}")


async def _read_body(request: Request, most_bytes: int) -> bytes:
    """Reads a body to its end, keeping no more of it than is allowed.

    What is too much is read and dropped: a client hears the answer only when all was taken.
    """
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most_bytes:
                    body += chunk
    except TimeoutError:
        raise RequestError(
            408, f"the body of a request has {_SECONDS_TO_SEND:g} seconds to arrive"
        ) from None
    except ClientDisconnect:
        raise RequestError(400, "the client went away") from None
    if size > most_bytes:
        raise RequestError(413, f"expected a body of at most {most_bytes} bytes, received {size}")
    return bytes(body)


def _decompress(body: bytes, most_bytes: int) -> bytes:
    """Decompresses gzip, but no more than is allowed: a few bytes can hold gigabytes."""
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(body)).read(most_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(400, f"Content-Encoding: the body is no valid gzip: {error}") from None
    if len(content) > most_bytes:
        raise RequestError(413, f"expected a body of at most {most_bytes} bytes, received more")
    return content


async def _show_request_error(_: Request, error: RequestError) -> Response:
    return _Json({"error": str(error)}, error.status)


async def _show_http_exception(request: Request, error: HTTPException) -> Response:
    message = f"Malformed request: {request.method} {request.url.path}: {error.detail}"
    return _Json({"error": message}, error.status_code, headers=error.headers)


async def _show_defect(_: Request, error: Exception) -> Response:
    return _Json({"error": f"Internal: {type(error).__name__}: {error}"}, 500)
