"""`/v1/batches`: files of requests that are answered when there is time for them
(https://platform.openai.com/docs/api-reference/batch)."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from mball.errors import InvalidRequest
from mball.server.batch.lines import ENDPOINTS
from mball.server.gateway.batches_store import PREFIX, Batch
from mball.server.gateway.files import LIFE_S, lifetime, page
from mball.server.gateway.files_open import Storage
from mball.server.gateway.files_store import new_id, owner_of
from mball.server.http import parse_object, read_body

_MAX_BODY_BYTES = 64 * 1024
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_MOST_WINDOW_S = 30 * _UNITS["d"]
_MOST_PAIRS, _MOST_OF_A_NAME, _MOST_OF_A_VALUE = 16, 64, 512


def router(kept: Storage) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(kept.check)])
    batches, runner = kept.batches, kept.runner

    @routes.post("/v1/batches")
    async def create(request: Request) -> dict[str, Any]:
        fields = parse_object(await read_body(request, _MAX_BODY_BYTES))
        name = request.state.key.name
        owner = owner_of(name)
        batch = _batch(name, fields)
        if kept.files.get(owner, batch.input_file_id).purpose != "batch":
            raise InvalidRequest("the file's purpose is not batch", param="input_file_id")
        with kept.files.incoming(owner):
            kept.files.check_count(owner)
            kept.files.check_bytes(owner)
            await batches.make_room(owner)
            await batches.add(owner, batch)
        runner.begin(batch)
        return batch.card()

    @routes.get("/v1/batches")
    async def every(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> dict[str, Any]:
        return page([batch.card() for batch in batches.all(owner_of(request.state.key.name))], after, limit)

    @routes.get("/v1/batches/{batch_id}")
    async def one(batch_id: str, request: Request) -> dict[str, Any]:
        return batches.get(owner_of(request.state.key.name), batch_id).card()

    @routes.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
        return (await runner.cancel(owner_of(request.state.key.name), batch_id)).card()

    return routes


def _batch(key_name: str, fields: dict[str, Any]) -> Batch:
    known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
    if unknown := sorted(set(fields) - known):
        raise InvalidRequest(f"unknown field {unknown[0]!r}", param=unknown[0])
    file_id, endpoint, window = (fields.get(name) for name in ("input_file_id", "endpoint", "completion_window"))
    if not isinstance(file_id, str):
        raise InvalidRequest("`input_file_id` must be the id of a file (POST /v1/files)", param="input_file_id")
    if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
        raise InvalidRequest(f"`endpoint` must be one of {', '.join(sorted(ENDPOINTS))}", param="endpoint")
    life_s, keep = LIFE_S, fields.get("output_expires_after")
    if keep is not None:
        if not isinstance(keep, dict):
            raise InvalidRequest("`output_expires_after` must be an object", param="output_expires_after")
        life_s = lifetime(keep.get("anchor"), keep.get("seconds"), "output_expires_after")
    now = int(time.time())
    return Batch(
        id=new_id(PREFIX),
        key_name=key_name,
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=str(window),
        created_at=now,
        expires_at=now + _window_s(window),
        output_id=new_id(),
        error_id=new_id(),
        output_life_s=life_s,
        metadata=_metadata(fields.get("metadata")),
    )


def _window_s(window: Any) -> int:
    found = re.fullmatch(r"([1-9]\d{0,6})([smhd])", window) if isinstance(window, str) else None
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _MOST_WINDOW_S:
        raise InvalidRequest("`completion_window` must be a time as 24h, at most 30d", param="completion_window")
    return seconds


def _metadata(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    fine = isinstance(given, dict) and len(given) <= _MOST_PAIRS
    if not fine or not all(
        isinstance(value, str) and len(name) <= _MOST_OF_A_NAME and len(value) <= _MOST_OF_A_VALUE
        for name, value in given.items()
    ):
        limits = f"{_MOST_PAIRS} texts of {_MOST_OF_A_VALUE} characters, with names of {_MOST_OF_A_NAME}"
        raise InvalidRequest(f"`metadata` must be at most {limits}", param="metadata")
    return dict(given)
