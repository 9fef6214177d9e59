"""Errors in OpenAI's shape."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from mball.errors import InvalidRequest, MballError, RequestError, Unavailable

_log = structlog.get_logger(__name__)


def error_body(error: Exception) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; what is not ours says nothing of its inside."""
    if isinstance(error, RequestError):
        fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
    elif isinstance(error, MballError):
        fields = {"message": str(error), "type": "server_error", "param": None, "code": None}
    else:
        fields = {"message": "internal error", "type": "server_error", "param": None, "code": None}
    return {"error": fields}


def error_headers(error: Exception) -> dict[str, str]:
    """Retry-After in whole seconds, at least one, where trying again helps."""
    if isinstance(error, Unavailable) and error.retry_after_s is not None:
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return {}


async def on_mball_error(_: Request, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, RequestError) else 500
    return JSONResponse(error_body(error), status_code=status, headers=error_headers(error))


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    what = HTTPStatus(status).phrase.lower()
    body = error_body(InvalidRequest(f"{request.method} {request.url.path}: {what}"))
    return JSONResponse(body, status_code=status, headers=headers)


async def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Starlette logs the traceback itself."""
    _log.error("request failed", path=request.url.path, error=repr(error))
    return JSONResponse(error_body(error), status_code=500)
