"""A middleware of vLLM's server: what a tenant asks has the tenant's salt, whatever salt it has of its own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mball.server.tenants import HEADER, salted

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]

_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})


class TenantSalt:
    """ASGI. The gateway has bounded the body, and read it as an object already."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        given = dict(scope.get("headers", ()))
        tenant = given.get(HEADER.encode(), b"").decode("latin-1")
        if scope["type"] != "http" or scope["path"] not in _PATHS or not tenant:
            await self._app(scope, receive, send)
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
