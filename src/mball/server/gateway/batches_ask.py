"""Requests of batches by the gateway's own ways, behind those that somebody waits for."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from starlette.types import Message

from mball.errors import Draining, MballError, QueueFull, QueueTimeout, RateLimited
from mball.server.batch.lines import Request
from mball.server.batch.work import Ask, NoAnswer, Reply
from mball.server.gateway.access import NOBODY, Key
from mball.server.gateway.live import Live
from mball.server.gateway.proxy import Forward
from mball.server.gateway.requests import Call
from mball.server.http import error_response
from mball.units import format_bytes

Forwarding = Callable[[Call, Key, str, str], Forward]
"""By the call, its key, its path and its id. Raises UnknownModel."""

_WAITS = (RateLimited, QueueFull, QueueTimeout, Draining)
"""No answers: a batch has time."""
_WAIT_S = 5.0
_LEAST_WAIT_S = 0.1
PRIORITY = 1 << 30
"""Behind whatever anybody asks for at once."""


class Gateway:
    """`concurrency` requests at once, of all batches together."""

    def __init__(self, forward: Forwarding, serves: Callable[[str], bool], live: Live, *, concurrency: int) -> None:
        """`serves` tells of a name whether there is such a model. Keys and limits are those in force when a request is
        made."""
        self._forward = forward
        self._serves = serves
        self._live = live
        self._slots = asyncio.Semaphore(concurrency)

    def serves(self, key_name: str) -> Callable[[str], bool]:
        """Whether a model is there for the one with this key."""
        key = self._key(key_name)
        return lambda model: key is not None and key.may_use(model) and self._serves(model)

    def _key(self, name: str) -> Key | None:
        keys = self._live.keys
        if not name:
            return NOBODY if not keys else None
        return next((key for key in keys if key.name == name), None)

    def asked_by(self, key_name: str) -> Ask:
        """What asks for the one with this key, as long as there is one."""

        async def ask(request: Request) -> Reply:
            body, request_id = json.dumps(request.body).encode(), uuid.uuid4().hex
            structlog.contextvars.bind_contextvars(request_id=request_id)
            most = self._live.config.max_body_bytes
            if len(body) > most:
                limit = f"the body is over {format_bytes(most)} (max_body_bytes)"
                raise NoAnswer(limit, code="payload_too_large", again=False)
            while True:
                if (key := self._key(key_name)) is None:
                    raise NoAnswer("its API key is not valid any more", code="invalid_api_key", again=False)
                try:
                    async with self._slots:
                        call = Call(body, request.model, stream=False, priority=PRIORITY)
                        return await _reply(self._forward(call, key, request.url, request_id), request_id)
                except _WAITS as error:
                    wait_s = _WAIT_S if error.retry_after_s is None else max(_LEAST_WAIT_S, error.retry_after_s)
                except MballError as error:
                    response = error_response(error)
                    retry_after = response.headers.get("retry-after")
                    return Reply(response.status_code, bytes(response.body), retry_after, request_id)
                except ConnectionAbortedError as error:
                    raise NoAnswer(str(error), code="connection", again=True) from None
                await asyncio.sleep(wait_s)

        return ask


async def _reply(forward: Forward, request_id: str) -> Reply:
    status, content = 500, bytearray()

    async def receive() -> Message:
        # There is no client that could leave.
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            content.extend(message.get("body", b""))

    await forward({"type": "http"}, receive, send)
    return Reply(status, bytes(content), request_id=request_id)
