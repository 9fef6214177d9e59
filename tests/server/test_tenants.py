"""Requests of different keys share no KV: with our workers and before vLLM's server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mball.server.tenants import HEADER, salted, tenant
from mball.server.worker.vllm_tenants import TenantSalt


def test_salts_differ_by_tenant_and_by_what_was_given() -> None:
    a, b = tenant("a"), tenant("b")
    salts = [salted(who, given) for who in ("", a, b) for given in (None, "x", f"{a} x", a)]
    assert salts[:4] == [None, "x", f"{a} x", a]
    # One who gives another's salt as his own is still himself.
    assert len(set(salts[4:])) == 8
    assert not set(salts[4:]) & {"x", f"{a} x", None}
    assert tenant("") == ""


async def passed(
    body: bytes, path: str = "/v1/completions", who: str = "", **options: Any
) -> tuple[bytes, dict[bytes, bytes]]:
    """What the server behind the middleware is given."""
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found, more = b"", True
        while more:
            message = await receive()
            found += message["body"]
            more = message["more_body"]
        seen.update(body=found, headers=dict(scope["headers"]))
        assert (await receive())["type"] == "http.disconnect"

    pieces = [
        {"type": "http.request", "body": body[:5], "more_body": True},
        {"type": "http.request", "body": body[5:], "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return pieces.pop(0)

    headers = [(b"content-length", str(len(body)).encode()), *([(HEADER.encode(), who.encode())] if who else [])]
    await TenantSalt(app, **options)({"type": "http", "path": path, "headers": headers}, receive, None)  # type: ignore[arg-type]
    return seen["body"], seen["headers"]


@pytest.mark.parametrize("given", [None, "mine"])
async def test_a_tenant_s_request_gets_its_salt(given: str | None) -> None:
    fields = {"model": "m", "prompt": "é", **({"cache_salt": given} if given else {})}
    body, headers = await passed(json.dumps(fields).encode(), who=tenant("a"))
    assert json.loads(body) == {**fields, "cache_salt": salted(tenant("a"), given)}
    assert headers[b"content-length"] == str(len(body)).encode()


@pytest.mark.parametrize(
    ("body", "path", "who"),
    [
        (b'{"model": "m"}', "/v1/completions", ""),
        (b'{"model": "m"}', "/v1/embeddings", "a"),
        (b'{"cache_salt": 3}', "/v1/completions", "a"),
        (b"[1, 2, 3, 4]", "/v1/completions", "a"),
        (b'"a text"', "/v1/completions", "a"),
        (b"no JSON", "/v1/completions", "a"),
    ],
)
async def test_all_else_passes_as_it_is(body: bytes, path: str, who: str) -> None:
    found, headers = await passed(body, path, who)
    assert found == body
    assert headers[b"content-length"] == str(len(body)).encode()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_a_path_that_takes_no_salt_is_not_for_tenants(path: str) -> None:
    """vLLM is not there, so no version of it takes one."""
    sent: list[Any] = []

    async def app(*_: Any) -> None:
        raise AssertionError("it was asked")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(HEADER.encode(), b"a")]}
    await TenantSalt(app)(scope, None, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 400
    assert path in json.loads(sent[1]["body"])["error"]["message"]
    body, _ = await passed(b'{"model": "m"}', path, "a", takes_salt=lambda _: True)
    assert json.loads(body)["cache_salt"] == salted("a", None)


async def test_who_leaves_before_the_body_is_whole_asks_nothing() -> None:
    async def app(*_: Any) -> None:
        raise AssertionError("it was asked")

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "path": "/v1/completions", "headers": [(HEADER.encode(), b"a")]}
    await TenantSalt(app)(scope, receive, None)  # type: ignore[arg-type]
