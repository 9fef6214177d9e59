"""Reading a request once, strictly; what is judged is what is forwarded, byte for byte."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mball.errors import InvalidRequest
from mball.server.http import header, parse_object, read_body

TIMEOUT_HEADER = "x-request-timeout"
PRIORITY_HEADER = "x-request-priority"
PROGRESS_HEADER = "x-mball-progress"
_TIMEOUT, _PRIORITY, _PROGRESS = TIMEOUT_HEADER.encode(), PRIORITY_HEADER.encode(), PROGRESS_HEADER.encode()


@dataclass(frozen=True, slots=True)
class Call:
    """A request for a model: the very bytes of its body, and what the gateway needs of it.

    `priority`: the lower goes first (None: it names none). `timeout_s`: what it gives for a whole answer since
    `began_s` of the monotonic clock (None: as long as the server does). `progress`: while its stream waits, events tell
    how its model comes.
    """

    body: bytes
    model: str
    stream: bool
    priority: int | None = None
    timeout_s: float | None = None
    began_s: float = 0.0
    progress: bool = False


async def read_call(request: Request, max_body_bytes: int) -> Call:
    """Raises PayloadTooLarge as soon as the body is over the limit, InvalidRequest for what is not a request."""
    began_s = time.monotonic()
    scope = request.scope
    timeout_s = _timeout(header(scope, _TIMEOUT))
    body = await read_body(request, max_body_bytes)
    fields = parse_object(body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("`model` must be the name of a model (see GET /v1/models)", param="model")
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest("`stream` must be true or false", param="stream")
    progress = (header(scope, _PROGRESS) or "").lower() in ("1", "true")
    return Call(body, model, bool(stream), _priority(fields, header(scope, _PRIORITY)), timeout_s, began_s, progress)


def _priority(fields: dict[str, Any], given: str | None) -> int | None:
    """vLLM's `priority` of the body; else the header, which an engine without priorities never sees."""
    priority = fields.get("priority")
    if priority is None and given is not None:
        try:
            return int(given)
        except ValueError:
            raise InvalidRequest(f"{PRIORITY_HEADER}: a whole number is wanted", param=PRIORITY_HEADER) from None
    if priority is not None and (not isinstance(priority, int) or isinstance(priority, bool)):
        raise InvalidRequest("`priority` must be a whole number", param="priority")
    return priority


def _timeout(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER}: seconds are wanted, more than 0", param=TIMEOUT_HEADER)
    return seconds
