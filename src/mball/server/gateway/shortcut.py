"""The way to the workers' paths past the framework, which costs more time there than all the rest of the gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mball.errors import MballError
from mball.server.http import error_response, on_unexpected

Endpoint = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """ASGI middleware: a POST to one of `paths` is answered by `endpoint`, as the route of that path would; all else
    goes on to the routes."""

    def __init__(self, app: ASGIApp, paths: Collection[str], endpoint: Endpoint) -> None:
        self._app = app
        self._paths = frozenset(paths)
        self._endpoint = endpoint
        self._unfailing = ServerErrorMiddleware(self._answer, handler=on_unexpected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        await self._unfailing(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._endpoint(Request(scope, receive))
            await response(scope, receive, send)
        except MballError as error:
            # One whose answer has begun is not raised.
            await error_response(error, scope["path"])(scope, receive, send)
