"""Who may ask for what: a key on every route but the probes, once there are keys.

A key is 32 random bytes, so its SHA-256 says nothing of it and needs no slow hash; the configuration holds that alone.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mball.errors import Forbidden, RateLimited, Unauthorized, UnknownModel
from mball.memory.rates import Smoothed
from mball.server.http import error_response, header, on_http_error

PUBLIC_PATHS = frozenset({"/health", "/ready", "/ui"})
"""Open to everybody: a probe of an orchestrator has no key, and learns nothing of the models; nor does the page, which
asks for one."""

ADMIN_PREFIX = "/mball/"
_ADMIN_PATHS = frozenset({"/metrics"})
_ADMIN_PAGES = frozenset({"/ui"})
"""Without a key, and of no use where the operator's routes are not."""

_PREFIX = "mb-"
_MINUTE_S = 60.0


def new_key() -> tuple[str, str]:
    """A key and its SHA-256 in hexadecimal."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, digest(key.encode())


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key: requests under way, waiting ones too, begun within a minute, and tokens within one. None: no limit.
    `priority`: the lowest that its requests may have."""

    max_in_flight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: int = 0


class _Allowance:
    """So much a minute, saved up for a minute at most. More may be spent than is there: then the next wait longer."""

    def __init__(self) -> None:
        self._left = math.inf
        self._at_s = time.monotonic()

    def wait_s(self, per_minute: int, least: float) -> float:
        """Until so much is there; 0 where it is."""
        return max(0.0, least - self._now(per_minute)) * _MINUTE_S / per_minute

    def _now(self, per_minute: int) -> float:
        now_s = time.monotonic()
        self._left = min(per_minute, self._left + (now_s - self._at_s) * per_minute / _MINUTE_S)
        self._at_s = now_s
        return self._left

    def headers(self, of: str, per_minute: int) -> list[tuple[bytes, bytes]]:
        """As OpenAI sends them: the limit, what is left of it, and when all of it is there again."""
        left = self._now(per_minute)
        reset_s = (per_minute - left) * _MINUTE_S / per_minute
        values = {"limit": per_minute, "remaining": max(0, math.floor(left)), "reset": _duration(reset_s)}
        return [(f"x-ratelimit-{name}-{of}".encode(), str(value).encode()) for name, value in values.items()]

    def spend(self, amount: float) -> None:
        self._left -= amount


def _duration(seconds: float) -> str:
    """As Go writes it, and OpenAI: 6m0s, 1.5s, 20ms."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{f'{minutes}m' if minutes else ''}{rest / 1000:g}s"


class Key:
    """One who may ask. `models`: for these alone (none: for all). `admin`: may move models, and see what is decided."""

    def __init__(
        self,
        name: str,
        sha256: str,
        *,
        admin: bool = False,
        models: frozenset[str] = frozenset(),
        limits: Limits | None = None,
    ) -> None:
        self.sha256 = sha256
        self._in_flight = 0
        self._requests, self._tokens = _Allowance(), _Allowance()
        self._took_s = Smoothed()
        self.change(name, admin=admin, models=models, limits=limits)

    def change(
        self, name: str, *, admin: bool = False, models: frozenset[str] = frozenset(), limits: Limits | None = None
    ) -> None:
        """From now on."""
        self.name = name
        self.admin = admin
        self.models = models
        self._limits = limits or Limits()

    def may_use(self, model: str) -> bool:
        return not self.models or model in self.models

    def check_model(self, model: str) -> None:
        """Raises UnknownModel: a model that a key may not use is not there for it."""
        if not self.may_use(model):
            raise UnknownModel(f"the model {model!r} is not served here (see GET /v1/models)", param="model")

    def priority(self, asked: int | None) -> int:
        """What a request has that asks for this. Raises Forbidden where the key may not go so far ahead of others."""
        least = self._limits.priority
        if asked is not None and asked < least:
            raise Forbidden(f"`priority` {asked}: this key may name {least} and above", param="priority")
        return max(least, asked or 0)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts one as under way. Raises RateLimited."""
        self._check(self._limits)
        self._in_flight += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._took_s.add(time.monotonic() - began_s)

    def spend(self, tokens: int) -> None:
        """They were prompt and answer of one of its requests."""
        if self._limits.tokens_per_minute is not None:
            self._tokens.spend(tokens)

    def telling(self, send: Send) -> Send:
        """With headers of what is left of its limits by the minute, in an answer; as it is where there are none."""
        if self._limits.requests_per_minute is None and self._limits.tokens_per_minute is None:
            return send

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._headers()]}
            await send(message)

        return told

    def _headers(self) -> list[tuple[bytes, bytes]]:
        requests, tokens = self._limits.requests_per_minute, self._limits.tokens_per_minute
        return [
            *([] if requests is None else self._requests.headers("requests", requests)),
            *([] if tokens is None else self._tokens.headers("tokens", tokens)),
        ]

    def _check(self, limits: Limits) -> None:
        most, requests, tokens = limits.max_in_flight, limits.requests_per_minute, limits.tokens_per_minute
        if most is not None and self._in_flight >= most:
            wait_s = (self._took_s.value or 0.0) / most
            raise RateLimited(f"{most} requests with this key are under way", retry_after_s=wait_s)
        if tokens is not None and (wait_s := self._tokens.wait_s(tokens, 1.0)) > 0:
            raise RateLimited(f"{tokens} tokens a minute are allowed with this key", retry_after_s=wait_s)
        if requests is not None:
            if (wait_s := self._requests.wait_s(requests, 1.0)) > 0:
                raise RateLimited(f"{requests} requests a minute are allowed with this key", retry_after_s=wait_s)
            self._requests.spend(1.0)


NOBODY = Key("", "", admin=True, limits=Limits(priority=-(2**63)))
"""Whoever comes where there are no keys."""


class Access:
    """ASGI middleware before every route. What it lets in has the key in `scope["state"]["key"]`. An operator's routes
    are on `admin_port` alone, where there is one."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key], admin_port: int | None = None) -> None:
        self._app = app
        self._keys = keys
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            key = self._admit(scope)
        except (Unauthorized, Forbidden) as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if self._is_elsewhere(scope):
            response = await on_http_error(Request(scope), HTTPException(404))
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, key.telling(send))

    def _admit(self, scope: Scope) -> Key:
        path = scope["path"]
        if not self._keys or path in PUBLIC_PATHS:
            return NOBODY
        key = self._find(scope)
        if key is None:
            raise Unauthorized("no valid API key: send it as `Authorization: Bearer KEY` (`mball keys new` makes one)")
        if _is_admin(path) and not key.admin:
            raise Forbidden(f"the key {key.name!r} may not administer the server; one with `admin: true` may")
        return key

    def _is_elsewhere(self, scope: Scope) -> bool:
        path = scope["path"]
        if self._admin_port is None or not (_is_admin(path) or path in _ADMIN_PAGES):
            return False
        server = scope.get("server")
        return server is None or server[1] != self._admin_port

    def _find(self, scope: Scope) -> Key | None:
        scheme, _, given = (header(scope, b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer":
            given = header(scope, b"x-api-key") or ""
        found, wanted = None, digest(given.strip().encode())
        # All are compared, whichever it is: the time tells nothing of where it stands, or how far it agrees.
        for key in self._keys:
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found


def _is_admin(path: str) -> bool:
    return path.startswith(ADMIN_PREFIX) or path in _ADMIN_PATHS
