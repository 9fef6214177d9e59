"""Reading a request once, strictly; what is judged is what is forwarded, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from mball.errors import InvalidRequest
from mball.server.http import parse_object, read_body


@dataclass(frozen=True, slots=True)
class Call:
    """A request for a model: the very bytes of its body, and what the gateway needs of it."""

    body: bytes
    model: str
    stream: bool


async def read_call(request: Request, max_body_bytes: int) -> Call:
    """Raises PayloadTooLarge as soon as the body is over the limit, InvalidRequest for what is not a request."""
    body = await read_body(request, max_body_bytes)
    fields = parse_object(body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("`model` must be the name of a model (see GET /v1/models)", param="model")
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest("`stream` must be true or false", param="stream")
    return Call(body, model, bool(stream))
