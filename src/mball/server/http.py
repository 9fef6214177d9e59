"""What the gateway and the workers share of HTTP: strict JSON bodies, OpenAI's error object, work that ends with its
client."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope

from mball.errors import InvalidRequest, MballError, PayloadTooLarge, RequestError, Unauthorized, Unavailable
from mball.units import format_bytes

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
_MAX_QUOTED = 2000
_PARAMETER = re.compile(r"\{[^}]*\}")

ANTHROPIC_PATH = "/v1/messages"
RESPONSES_PATH = "/v1/responses"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def header(scope: Scope, name: bytes) -> str | None:
    """The first of a request's headers of a name in lower case. A framework's own mapping of them, which decodes each
    that it passes, is for where nobody waits."""
    for each, value in scope["headers"]:
        if each == name:
            return bytes(value).decode("latin-1")
    return None


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body. Raises PayloadTooLarge as soon as it is over the limit, InvalidRequest where the client left."""
    declared = header(request.scope, b"content-length") or "0"
    if declared.isdecimal() and int(declared) > max_body_bytes:
        raise _too_large(max_body_bytes)
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client left before its body was whole")
        body += message.get("body", b"")
        if len(body) > max_body_bytes:
            raise _too_large(max_body_bytes)
        more = message.get("more_body", False)
    return bytes(body)


def _too_large(max_body_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is over {format_bytes(max_body_bytes)} (max_body_bytes)")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) without duplicate keys, NaN or Infinity. Raises InvalidRequest."""
    try:
        value = _STRICT.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
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
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InvalidRequest(f"the key {double!r} stands twice in one object", param=double)
    return fields


def _not_json(constant: str) -> NoReturn:
    raise InvalidRequest(f"the body is not JSON: {constant} is no number in it")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_json)


def error_body(error: Exception) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; what is not ours says nothing of its inside."""
    if isinstance(error, RequestError):
        fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    elif isinstance(error, MballError):
        fields = {"message": str(error), "type": "server_error", "param": None, "code": None}
    else:
        fields = {"message": "internal error", "type": "server_error", "param": None, "code": None}
    return {"error": {name: _quotable(value) for name, value in fields.items()}}


def _quotable(text: str | None) -> str | None:
    """What is quoted from a request may be long, and hold half of a surrogate pair, which no answer can."""
    return text and text[:_MAX_QUOTED].encode(errors="backslashreplace").decode()


def error_body_of(path: str, error: Exception) -> dict[str, Any]:
    """The error as the API has it that the path belongs to."""
    body = error_body(error)
    if not path.startswith(ANTHROPIC_PATH):
        return body
    status = error.status if isinstance(error, RequestError) else 500
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}


def stream_error(error: Exception, path: str) -> bytes:
    """The last event of a stream that breaks off, as the API has it that the path belongs to."""
    return stream_error_of(error_body_of(path, error), path)


def stream_error_of(body: dict[str, Any], path: str) -> bytes:
    """The same of an error's body."""
    if path.startswith(RESPONSES_PATH):
        error = body.get("error")
        fields = error if isinstance(error, dict) else {}
        body = {
            "type": "error",
            "sequence_number": 0,
            **{name: fields.get(name) for name in ("code", "message", "param")},
        }
    elif not path.startswith(ANTHROPIC_PATH):
        return f"data: {json.dumps(body)}\n\n".encode()
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


def is_whole(path: str, tail: bytes) -> bool:
    """Whether a stream that ends so had come to its end."""
    if path.startswith(ANTHROPIC_PATH):
        return b"event: message_stop" in tail
    if path.startswith(RESPONSES_PATH):
        # Its last event may be longer than what is left of the end; no other one says a usage.
        return tail.endswith(b"}\n\n") and b'"usage":{' in tail.rpartition(b"\n\nevent: ")[2]
    return tail.endswith(b"data: [DONE]\n\n")


def error_response(error: Exception, path: str = "") -> JSONResponse:
    """The error with its status, and a Retry-After in whole seconds where trying again helps."""
    headers = {}
    if isinstance(error, Unavailable) and error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, PayloadTooLarge):
        # Else the rest of the body is read and thrown away for as long as it comes.
        headers["connection"] = "close"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    status = error.status if isinstance(error, RequestError) else 500
    return JSONResponse(error_body_of(path, error), status_code=status, headers=headers)


async def on_mball_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(error, request.url.path)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if status == HTTPStatus.METHOD_NOT_ALLOWED and (methods := _allowed(request)):
        headers = {"allow": ", ".join(methods)}
    what = HTTPStatus(status).phrase.lower()
    body = error_body(InvalidRequest(f"{request.method} {request.url.path}: {what}"))
    return JSONResponse(body, status_code=status, headers=headers)


def _allowed(request: Request) -> list[str]:
    """The methods of a path, each of which has a route of its own; of the described paths that match, those of the most
    literal. A worker has no description, and one route a path, whose own answer says its methods."""
    describe = getattr(request.app, "openapi", None)
    paths: dict[str, dict[str, Any]] = {} if describe is None else describe()["paths"]
    found = [(len("".join(parts)), path) for path in paths if _fits(request.url.path, parts := _PARAMETER.split(path))]
    return sorted(method.upper() for method in paths[max(found)[1]]) if found else []


def _fits(path: str, parts: list[str]) -> bool:
    return re.fullmatch(".+".join(map(re.escape, parts)), path) is not None


async def on_invalid(_: Request, error: Exception) -> JSONResponse:
    """A path's or query's parameter that is not what its route says."""
    found = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": ("",), "msg": str(error)}
    name = str(found["loc"][-1])
    return error_response(InvalidRequest(f"`{name}`: {found['msg']}", param=name))


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Starlette logs the traceback itself."""
    _log.error("request failed", path=request.url.path, error=repr(error))
    return error_response(error, request.url.path)


class ClientLeft(MballError):
    """The client closed its connection; there is nobody to answer."""


async def unless_disconnected(work: Coroutine[Any, Any, _T], receive: Receive) -> _T:
    """Does `work` and gives its result; cancels it as soon as the client leaves, and raises ClientLeft."""
    worker = asyncio.current_task()
    cancelled_before = worker.cancelling() if worker is not None else 0
    left = False

    async def watch() -> None:
        nonlocal left
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
        left = True
        if worker is not None:
            worker.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and worker is not None and worker.uncancel() <= cancelled_before:
            raise ClientLeft("the client left before its answer was whole") from None
        raise
    finally:
        # It ends at its next turn, and touches nothing.
        watching.cancel()
