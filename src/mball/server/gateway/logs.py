"""What a model's workers write, as they write it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fastapi import APIRouter
from sse_starlette import EventSourceResponse, ServerSentEvent

from mball.memory.manager import Manager

_HEARTBEAT_S = 15
_SEND_TIMEOUT_S = 60.0


def router(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/mball/v1")

    @routes.get("/models/{name:path}/log/stream", response_class=EventSourceResponse)
    async def log(name: str) -> EventSourceResponse:
        """The last lines that its workers wrote and all that come after them, each an event with a JSON string."""
        lines = manager.log_lines(name)
        return EventSourceResponse(_events(lines), ping=_HEARTBEAT_S, send_timeout=_SEND_TIMEOUT_S)

    return routes


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[ServerSentEvent]:
    async for line in lines:
        yield ServerSentEvent(json.dumps(line), event="line")
