"""A name for every request: in its answer, in the log, and on the way to its worker."""

from __future__ import annotations

import random
import re

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mball.server.http import header

HEADER = "x-request-id"
_NAME = HEADER.encode()

_VALID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""No blank, quote, line end or control character: what is not so never gets into a log or a header."""


class RequestIds:
    """ASGI middleware. The client's X-Request-Id where it is a plain one, else one of our own, is in
    `scope["state"]["request_id"]`, in what the request logs, and in its answer's head."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, _NAME) or ""
        request_id = given if _VALID.fullmatch(given) else random.randbytes(16).hex()
        scope.setdefault("state", {})["request_id"] = request_id
        # The request's task has a context of its own, which ends with it.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        head = (_NAME, request_id.encode())

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), head]
            await send(message)

        await self._app(scope, receive, named)
