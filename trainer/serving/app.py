"""The web application: TensorFlow Serving's REST API, a health check, and a page to draw on."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow as tf
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from trainer import keras_objects
from trainer.errors import InputError
from trainer.serving.messages import parse_request, render_response
from trainer.serving.servable import Servable, Servables

# Errors whose cause is the request.
_REFUSED = (ClientDisconnect, InputError, tf.errors.InvalidArgumentError)


def make_server(servables: Servables, *, max_body_bytes: int) -> uvicorn.Server:
    """Makes a server that accepts bodies up to a size. Call its `run` with a socket."""
    handlers = _Handlers(servables)
    routes = [Route("/", handlers.page), Route("/health", handlers.health)]
    model = f"/v1/models/{servables.newest.name}"
    for prefix in (model, f"{model}/versions/{{version:int}}"):
        routes += [
            Route(f"{prefix}:predict", handlers.predict, methods=["POST"]),
            Route(f"{prefix}/metadata", handlers.metadata),
            Route(prefix, handlers.status),
        ]
    kinds = (HTTPException, *_REFUSED, Exception)
    errors = dict.fromkeys(kinds, _render_error)
    app = Starlette(routes=routes, exception_handlers=errors, max_body_size=max_body_bytes)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        limit_concurrency=512,  # connections
        timeout_graceful_shutdown=10,  # seconds for running requests
        callback_notify=partial(run_in_threadpool, servables.refresh),
        timeout_notify=0,  # every second
    )
    return uvicorn.Server(config)


class _Handlers:
    """One method for each address."""

    def __init__(self, servables: Servables) -> None:
        self._servables = servables

    async def predict(self, request: Request) -> Response:
        servable = await self._find(request)
        body = await request.body()
        # In a thread, because it may decode image files.
        images, by_row = await run_in_threadpool(parse_request, body, servable.spec)
        outputs = await servable.batcher.predict(images)
        return _json(render_response(outputs, by_row=by_row))

    async def metadata(self, request: Request) -> Response:
        return _json((await self._find(request)).metadata)

    async def status(self, request: Request) -> Response:
        version = str(request.path_params.get("version", ""))
        states = [each for each in self._servables.status() if version in ("", each["version"])]
        if not states:
            raise HTTPException(404)
        return _json({"model_version_status": states})

    async def health(self, _: Request) -> Response:
        newest = self._servables.newest
        return _json({"status": "ok", "model": newest.name, "version": str(newest.version)})

    async def page(self, _: Request) -> Response:
        return FileResponse(Path(__file__).with_name("page.html"))

    async def _find(self, request: Request) -> Servable:
        if "version" not in request.path_params:
            return self._servables.newest
        # In a thread, because it may load an older version.
        servable = await run_in_threadpool(self._servables.find, request.path_params["version"])
        if servable is None:
            raise HTTPException(404)
        return servable


def _json(content: Any, status: int = 200) -> Response:
    """Returns a response in ASCII JSON, with NaN and Infinity as in TensorFlow Serving."""
    text = json.dumps(content, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


async def _render_error(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _json({"error": error.detail}, error.status_code)
    refused = isinstance(error, _REFUSED)
    return _json({"error": keras_objects.explain(error)}, 400 if refused else 500)
