"""The web application: TensorFlow Serving's REST API, a health check, and a page to draw on."""

import asyncio
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import tensorflow as tf
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import IntegerConvertor, StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from trainer import keras_objects
from trainer.serving.batching import Batcher
from trainer.serving.messages import parse_request, render_response
from trainer.serving.servable import Servable, Servables
from trainer.serving.uvicorn_internals import Protocol

_VERSION_CHECK_SECONDS = 1.0
_INLINE_BYTES = 100_000  # parsing less takes less time than switching to another thread
_BODY_TIMEOUT_SECONDS = 30.0
_SHUTDOWN_SECONDS = 10  # for running requests


class _ModelName(StringConvertor):
    regex = "[^/:]+"


class _VersionNumber(IntegerConvertor):
    regex = "[0-9]{1,255}"  # a folder name has at most 255 characters


register_url_convertor("model", _ModelName())
register_url_convertor("number", _VersionNumber())


def make_server(servables: Servables, *, max_body_bytes: int) -> uvicorn.Server:
    """Makes the server. Call its `run` with a socket.

    Args:
        servables: The versions of the model.
        max_body_bytes: Largest accepted body of a request, after decompression.
    """
    handlers = _Handlers(servables, max_body_bytes)
    routes = [Route("/", handlers.page), Route("/health", handlers.health)]
    for prefix in ("/v1/models/{name:model}", "/v1/models/{name:model}/versions/{version:number}"):
        routes += [
            Route(f"{prefix}:predict", handlers.predict, methods=["POST"]),
            Route(f"{prefix}/metadata", handlers.metadata),
            Route(prefix, handlers.status),
        ]
    errors = {HTTPException: _render_http_error, Exception: _render_defect}
    app = Starlette(routes=routes, lifespan=handlers.lifespan, exception_handlers=errors)
    app.router.redirect_slashes = False
    config = uvicorn.Config(
        app,
        http=Protocol,
        log_config=None,
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a response in ASCII JSON, with NaN and Infinity as in TensorFlow Serving."""
    text = json.dumps(content, separators=(",", ":"))
    return Response(text, status, headers, "application/json")


class _Handlers:
    """One method for each address. Slow work runs in threads, so that other clients are served."""

    def __init__(self, servables: Servables, max_body_bytes: int) -> None:
        self._servables = servables
        self._max_body_bytes = max_body_bytes
        self._batcher = Batcher()

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Loads new versions while the server runs."""

        async def watch_versions() -> None:
            while True:
                await asyncio.sleep(_VERSION_CHECK_SECONDS)
                await run_in_threadpool(self._servables.refresh)

        task = asyncio.create_task(watch_versions())
        yield
        task.cancel()

    async def predict(self, request: Request) -> Response:
        servable = await self._find(request)
        body = await _read_body(request, self._max_body_bytes)
        if len(body) <= _INLINE_BYTES:
            call = parse_request(body, servable.signatures)
        else:
            call = await run_in_threadpool(parse_request, body, servable.signatures)
        try:
            outputs = await self._batcher.predict(servable, call.signature, call.tensors)
        except tf.errors.InvalidArgumentError as error:
            raise HTTPException(400, keras_objects.explain(error)) from error
        return _json(render_response(outputs, by_row=call.by_row))

    async def metadata(self, request: Request) -> Response:
        servable = await self._find(request)
        return _json(servable.metadata(self._servables.name))

    async def status(self, request: Request) -> Response:
        found = await self._look_up(request, self._servables.status)
        return _json({"model_version_status": found})

    async def health(self, _: Request) -> Response:
        name, version = self._servables.name, str(self._servables.newest.version)
        return _json({"status": "ok", "model": name, "version": version})

    async def page(self, _: Request) -> Response:
        return FileResponse(Path(__file__).with_name("page.html"))

    async def _find(self, request: Request) -> Servable:
        if request.path_params == {"name": self._servables.name}:
            return self._servables.newest  # without the detour through a thread
        servable: Servable = await self._look_up(request, self._servables.find)
        return servable

    async def _look_up(self, request: Request, find: Callable[[int | None], Any]) -> Any:
        """Calls `find` in a thread, because it may load an older version."""
        name, version = request.path_params["name"], request.path_params.get("version")
        found = name == self._servables.name and await run_in_threadpool(find, version)
        if not found:
            which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise HTTPException(404, f"Servable not found for request: {which}")
        return found


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Reads and decompresses a body.

    A body that is too large is read to its end and dropped, because most clients read the response
    only after sending everything.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    body += chunk
    except TimeoutError:
        message = f"expected the body of a request within {_BODY_TIMEOUT_SECONDS:g} seconds"
        raise HTTPException(408, message) from None
    except ClientDisconnect:
        raise HTTPException(400, "the client closed the connection") from None
    if size > max_bytes:
        raise HTTPException(413, f"expected at most {max_bytes} bytes of body, received {size}")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding in ("gzip", "x-gzip"):
        return await run_in_threadpool(_decompress, bytes(body), max_bytes)
    if encoding != "identity":
        raise HTTPException(415, f"Content-Encoding: expected gzip, received {encoding!r}")
    return bytes(body)


def _decompress(body: bytes, max_bytes: int) -> bytes:
    """Decompresses gzip up to a limit, because a few bytes can unpack to gigabytes."""
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(body)).read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        message = f"Content-Encoding: the body is not valid gzip: {error}"
        raise HTTPException(400, message) from None
    if len(content) > max_bytes:
        raise HTTPException(413, f"expected at most {max_bytes} bytes of body, received more")
    return content


async def _render_http_error(request: Request, error: Any) -> Response:
    message = error.detail
    if message == HTTPStatus(error.status_code).phrase:  # raised by the router
        message = f"Malformed request: {request.method} {request.url.path}: {message}"
    return _json({"error": message}, error.status_code, error.headers)


async def _render_defect(_: Request, error: Exception) -> Response:
    return _json({"error": f"Internal: {type(error).__name__}: {error}"}, 500)
