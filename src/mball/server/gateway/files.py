"""`/v1/files`: requests handed in for batches, and their answers (https://platform.openai.com/docs/api-reference/files)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, JSONResponse

from mball.errors import InvalidRequest, NotFound
from mball.server.gateway import files_records as records
from mball.server.gateway.files_open import Storage
from mball.server.gateway.files_store import File, new_id, owner_of
from mball.server.gateway.files_upload import Form, receive
from mball.server.threads import whole

_DAY_S = 24 * 3600
LEAST_LIFE_S, LIFE_S, MOST_LIFE_S = 3600, 30 * _DAY_S, 365 * _DAY_S
_MOST_OF_A_NAME = 255


def router(kept: Storage) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(kept.check)])
    files = kept.files

    @routes.post("/v1/files")
    async def upload(request: Request) -> JSONResponse:
        owner = owner_of(request.state.key.name)
        await kept.sweep()
        file_id = new_id()
        target = files.path(owner, file_id)
        part = target.with_suffix(records.PART)
        with files.incoming(owner) as incoming:
            files.check_count(owner)
            await files.open_folder(owner)
            try:
                form = await receive(
                    request,
                    part,
                    max_bytes=kept.max_file_bytes,
                    incoming=incoming,
                    check=lambda: files.check_bytes(owner),
                    deadline_s=kept.upload_timeout_s,
                )
                file = _file(file_id, form, incoming.nbytes)
                await whole(part.replace, target)
            except OSError as error:
                raise records.failed(target, error) from None
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        await files.add(owner, file)
        return JSONResponse(file.card())

    @routes.get("/v1/files")
    async def every(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        found = [f for f in files.all(owner_of(request.state.key.name)) if purpose in (None, f.purpose)]
        if order == "asc":
            found.reverse()
        return page([file.card() for file in found], after, limit)

    @routes.get("/v1/files/{file_id}")
    async def one(file_id: str, request: Request) -> dict[str, Any]:
        return files.get(owner_of(request.state.key.name), file_id).card()

    @routes.get("/v1/files/{file_id}/content", response_class=FileResponse)
    async def content(file_id: str, request: Request) -> FileResponse:
        owner = owner_of(request.state.key.name)
        file = files.get(owner, file_id)
        path = files.path(owner, file_id)
        try:
            found = await whole(path.stat)
        except OSError as error:
            raise records.failed(path, error) from None
        return FileResponse(path, stat_result=found, filename=file.filename, media_type="application/octet-stream")

    @routes.delete("/v1/files/{file_id}")
    async def delete(file_id: str, request: Request) -> dict[str, Any]:
        owner = owner_of(request.state.key.name)
        files.get(owner, file_id)
        if (user := kept.batches.reading(owner, file_id)) is not None:
            raise InvalidRequest(f"{user} reads it: cancel that first, or wait for its end", param="file_id")
        await files.delete(owner, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def page(cards: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Of a list, what comes behind the id `after`. Raises NotFound."""
    start = 0
    if after is not None:
        start = next((n for n, card in enumerate(cards, start=1) if card["id"] == after), 0)
        if not start:
            raise NotFound(f"nothing here has the id {after!r}", param="after")
    data = list(cards[start : start + limit])
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": start + limit < len(cards)}


def lifetime(anchor: Any, seconds: Any, param: str) -> int:
    """How long a file is kept, as `expires_after` says it. Raises InvalidRequest."""
    if anchor != "created_at":
        raise InvalidRequest(f"{param}[anchor] must be created_at", param=param)
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not LEAST_LIFE_S <= seconds <= MOST_LIFE_S:
        raise InvalidRequest(f"{param}[seconds] must be {LEAST_LIFE_S} to {MOST_LIFE_S}", param=param)
    return seconds


def _file(file_id: str, form: Form, nbytes: int) -> File:
    fields = dict(form.fields)
    if form.filename is None:
        raise InvalidRequest("there is no field `file`", param="file")
    if (purpose := fields.pop("purpose", None)) != "batch":
        raise InvalidRequest(f"`purpose` must be batch, not {purpose!r}", param="purpose")
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    life_s = LIFE_S
    if anchor is not None or seconds is not None:
        given = int(seconds) if seconds is not None and seconds.isdecimal() else None
        life_s = lifetime(anchor, given, "expires_after")
    if fields:
        raise InvalidRequest(f"unknown field {min(fields)!r}", param=min(fields))
    now = int(time.time())
    name = form.filename[:_MOST_OF_A_NAME] or file_id
    return File(file_id, name, "batch", now, nbytes, now + life_s)
