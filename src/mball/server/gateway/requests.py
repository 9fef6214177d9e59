"""Reading a request once, strictly; what is judged is what is forwarded, byte for byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from mball.errors import InvalidRequest, PayloadTooLarge
from mball.units import format_bytes


@dataclass(frozen=True, slots=True)
class Call:
    """A request for a model: the very bytes of its body, and what the gateway needs of it."""

    body: bytes
    model: str
    stream: bool


async def read_call(request: Request, max_body_bytes: int) -> Call:
    """Raises PayloadTooLarge as soon as the body is over the limit, InvalidRequest for what is not a request."""
    body = await _read_body(request, max_body_bytes)
    fields = parse_object(body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("`model` must be the name of a model (see GET /v1/models)", param="model")
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest("`stream` must be true or false", param="stream")
    return Call(body, model, bool(stream))


async def _read_body(request: Request, max_body_bytes: int) -> bytes:
    limit = f"the body is over {format_bytes(max_body_bytes)} (max_body_bytes)"
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_body_bytes:
        raise PayloadTooLarge(limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_body_bytes:
                raise PayloadTooLarge(limit)
    except ClientDisconnect:
        raise InvalidRequest("the client left before its body was whole") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) without duplicate keys, NaN or Infinity. Raises InvalidRequest."""
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_not_json)
    except InvalidRequest:
        raise
    except RecursionError:
        raise InvalidRequest("the body is nested too deep") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"the key {double!r} stands twice in one object", param=double)
    return fields


def _not_json(constant: str) -> NoReturn:
    raise InvalidRequest(f"the body is not JSON: {constant} is no number in it")
