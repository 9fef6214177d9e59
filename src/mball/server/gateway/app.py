"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mball import __version__
from mball.errors import MballError, UnknownModel
from mball.memory.manager import Manager
from mball.server import http
from mball.server.catalog import state_dir
from mball.server.config import Config
from mball.server.gateway import admin, batches, files, logs, ui
from mball.server.gateway.access import PUBLIC_PATHS, Access, Key
from mball.server.gateway.batches_ask import Forwarding, Gateway
from mball.server.gateway.batches_figures import BatchFigures
from mball.server.gateway.files_open import Storage
from mball.server.gateway.live import Live
from mball.server.gateway.metrics import CONTENT_TYPE, Metrics
from mball.server.gateway.openapi import describe
from mball.server.gateway.proxy import Forward
from mball.server.gateway.request_ids import RequestIds
from mball.server.gateway.requests import Call, read_call
from mball.server.gateway.shortcut import Endpoint, Shortcut
from mball.server.gateway.tracing import Tracing
from mball.server.gateway.upstream import Workers

FORWARDED_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
"""What reaches a worker; nothing else does."""


class _App(FastAPI):
    """The framework behind a `front` of few layers, which are all that a request for a worker passes."""

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.front(scope, receive, send)


def create_app(manager: Manager, config: Config, live: Live | None = None, *, admin_port: int | None = None) -> FastAPI:
    """The gateway over a manager, which starts and closes with the app. `live` is what a reload replaces; an operator's
    routes answer on `admin_port` alone, where there is one."""
    live = Live(config) if live is None else live
    workers = Workers()
    metrics = Metrics(manager)
    tracing = Tracing() if config.traces else None
    pass_on = _forwarding(manager, workers, live, metrics, tracing)
    storage = _storage(manager, live, pass_on)
    metrics.also(BatchFigures(storage.batches))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(metrics.follow(), name="metrics")
        try:
            await manager.start()
            await storage.open()
            yield
        finally:
            await storage.close()
            await manager.close(config.drain_timeout_s)
            workers.close()
            following.cancel()
            await asyncio.wait({following})
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = _App(title="MBALL", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(MballError, http.on_mball_error)
    app.add_exception_handler(HTTPException, http.on_http_error)
    app.add_exception_handler(RequestValidationError, http.on_invalid)
    app.add_exception_handler(Exception, http.on_unexpected)
    forward = _endpoint(live, pass_on)
    app.include_router(_openai(manager, forward))
    app.include_router(files.router(storage))
    app.include_router(batches.router(storage))
    app.include_router(_probes(manager))
    app.include_router(_metrics(metrics))
    app.include_router(logs.router(manager))
    app.include_router(admin.router(manager))
    app.include_router(ui.router())
    describe(app, FORWARDED_PATHS, PUBLIC_PATHS)
    shortcut = Shortcut(partial(FastAPI.__call__, app), FORWARDED_PATHS, forward)
    app.front = RequestIds(Access(shortcut, live.keys, admin_port))
    return app


def _forwarding(
    manager: Manager, workers: Workers, live: Live, metrics: Metrics, tracing: Tracing | None
) -> Forwarding:
    def forward(call: Call, key: Key, path: str, request_id: str) -> Forward:
        key.check_model(call.model)
        measured = metrics.request(call.model)
        if (served_by := manager.adapters().get(call.model)) is not None:
            # An adapter is served by its model, which finds its name in the body.
            call = replace(call, model=served_by)
        return Forward(call, key, path, request_id, manager, workers, measured, live.config, tracing)

    return forward


def _endpoint(live: Live, forward: Forwarding) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        call = await read_call(request, live.config.max_body_bytes)
        state = request.scope["state"]
        return forward(call, state["key"], request.scope["path"], state["request_id"])

    return endpoint


def _storage(manager: Manager, live: Live, forward: Forwarding) -> Storage:
    config = live.config
    limits, base = config.files, config.state_dir or state_dir()
    gateway = Gateway(forward, manager.serves, live, concurrency=limits.concurrency)
    root = limits.path.expanduser() if limits.path is not None else base and base / "files"
    return Storage(root, limits, gateway, upload_timeout_s=config.request_timeout_s)


def _openai(manager: Manager, forward: Endpoint) -> APIRouter:
    router = APIRouter()
    started = int(time.time())

    for path in FORWARDED_PATHS:
        router.add_api_route(path, forward, methods=["POST"], response_class=Response)

    def card(name: str) -> dict[str, Any]:
        adapters = manager.adapters()
        parent = {"parent": adapters[name]} if name in adapters else {}
        return {"id": name, "object": "model", "created": started, "owned_by": "mball", **parent}

    def names() -> list[str]:
        return [*manager.names(), *manager.adapters()]

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in names() if request.state.key.may_use(name)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        if name not in names() or not request.state.key.may_use(name):
            raise UnknownModel(f"the model {name!r} is not served here (see GET /v1/models)", param="model")
        return card(name)

    return router


def _metrics(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


def _probes(manager: Manager) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """It takes requests: not shutting down, and not every model failed."""
        why = manager.not_ready()
        return JSONResponse({"ready": why is None, "reason": why}, status_code=200 if why is None else 503)

    return router
