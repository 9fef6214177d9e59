"""MBALL's own routes: the state, what happens, and moving models by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from mball.errors import InvalidRequest
from mball.memory.events import Events, Follower
from mball.memory.manager import Manager
from mball.server.http import parse_object, read_body
from mball.units import parse_bytes

_HEARTBEAT_S = 15
_SEND_TIMEOUT_S = 60.0
_MAX_BODY_BYTES = 4096


def router(manager: Manager) -> APIRouter:
    """`/mball/v1/…`. Each move answers with the state of its model after it."""
    routes = APIRouter(prefix="/mball/v1")

    def model_state(name: str) -> dict[str, Any]:
        models: list[dict[str, Any]] = manager.snapshot()["models"]
        return next(state for state in models if state["name"] == name)

    @routes.get("/state")
    async def state() -> dict[str, Any]:
        return manager.snapshot()

    @routes.get("/events", response_class=EventSourceResponse)
    async def events(request: Request, recent: Annotated[int, Query(ge=0, le=1024)] = 0) -> EventSourceResponse:
        """What is decided and done, as it happens, after the `recent` last, or after the Last-Event-ID.

        Events have the kind as their type and the event as JSON. `missed` tells of those that are no longer kept, and
        `dropped` ends the stream of a reader that is too slow.
        """
        follower = manager.events.follow(request.headers.get("last-event-id"), recent)
        stream = _stream(manager.events, follower)
        return EventSourceResponse(stream, ping=_HEARTBEAT_S, send_timeout=_SEND_TIMEOUT_S)

    @routes.get("/models/{name:path}/log", response_class=PlainTextResponse)
    async def log(name: str) -> str:
        """The last lines that its workers wrote."""
        return await asyncio.to_thread(manager.log_tail, name)

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model's state, and under `engine` what its engine says of itself."""
        return {"engine": await manager.engine_status(name), **model_state(name)}

    @routes.post("/models/{name:path}/load")
    async def load(name: str) -> dict[str, Any]:
        await manager.load(name)
        return model_state(name)

    @routes.post("/models/{name:path}/unload")
    async def unload(name: str) -> dict[str, Any]:
        await manager.unload(name)
        return model_state(name)

    @routes.post("/models/{name:path}/pin")
    async def pin(name: str) -> dict[str, Any]:
        await manager.pin(name)
        return model_state(name)

    @routes.post("/models/{name:path}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        await manager.unpin(name)
        return model_state(name)

    @routes.post("/models/{name:path}/balloon")
    async def balloon(name: str, request: Request) -> dict[str, Any]:
        """`{"bytes": 1073741824}` or `{"bytes": "1GiB"}`: what the model does without from now on; 0 gives it back."""
        fields = parse_object(await read_body(request, _MAX_BODY_BYTES))
        try:
            nbytes = parse_bytes(fields["bytes"])
        except (KeyError, ValueError):
            raise InvalidRequest("`bytes` must be a size: 1073741824 or '1GiB'", param="bytes") from None
        await manager.balloon(name, nbytes)
        return model_state(name)

    return routes


async def _stream(events: Events, follower: Follower) -> AsyncIterator[ServerSentEvent]:
    try:
        if follower.missed:
            yield ServerSentEvent(json.dumps({"missed": follower.missed}), event="missed")
        async for event in follower:
            yield ServerSentEvent(json.dumps(event.as_dict()), event=event.kind, id=events.id_of(event))
        if follower.lost:
            why = "this reader is slower than what happens; go on with the last id"
            yield ServerSentEvent(json.dumps({"reason": why}), event="dropped")
    finally:
        events.leave(follower)
