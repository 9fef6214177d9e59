"""A middleware of vLLM's server: what a tenant asks has the tenant's salt, whatever salt it has of its own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mball.loader import vllm_compat
from mball.server.tenants import HEADER, salted

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})


class TenantSalt:
    """ASGI. The gateway has bounded the body, and read it as an object already. A path whose requests take no salt in
    this version of vLLM is not for tenants: they would share KV."""

    def __init__(self, app: _App, takes_salt: Callable[[str], bool] = vllm_compat.takes_salt) -> None:
        self._app = app
        self._takes_salt = takes_salt

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        given = dict(scope.get("headers", ()))
        tenant = given.get(HEADER.encode(), b"").decode("latin-1")
        if scope["type"] != "http" or scope["path"] not in _PATHS or not tenant:
            await self._app(scope, receive, send)
            return
        if not self._takes_salt(scope["path"]):
            await _refuse(scope["path"], send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        changed = _with_salt(bytes(body), tenant)
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
        left = [{"type": "http.request", "body": changed, "more_body": False}]

        async def again() -> _Message:
            return left.pop() if left else await receive()

        await self._app(scope, again, send)


async def _refuse(path: str, send: _Send) -> None:
    told = f"{path}: this version of vLLM can't keep the KV of different API keys apart there; use /v1/chat/completions"
    error = {"message": told, "type": "invalid_request_error", "param": None, "code": "unsupported_endpoint"}
    body = json.dumps({"type": "error", "error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_salt(body: bytes, tenant: str) -> bytes:
    """What is no object is vLLM's to refuse, and so is a salt that is no text."""
    try:
        fields = json.loads(body)
    except ValueError:
        return body
    salt = fields.get("cache_salt") if isinstance(fields, dict) else 0
    if salt is not None and not isinstance(salt, str):
        return body
    return json.dumps({**fields, "cache_salt": salted(tenant, salt)}).encode()
