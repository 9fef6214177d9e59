"""Every request has a name, and nothing that a client sends breaks a line of the log."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from typing import Any

import pytest
import structlog

from mball.server.log import plain
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start
from tests.server.gateway.test_app import CHAT, body

EVIL = [b"a\nb", b"a\x1b[2Jb", b'{"a": 1}', b"a b", b"", b"a" * 129, "ä".encode()]


async def ask(running: Gateway, request_id: bytes | None, path: bytes = CHAT.encode()) -> dict[bytes, bytes]:
    """The head of the answer to a request whose bytes are as they are here."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
    data = body("a")
    given = b"" if request_id is None else b"X-Request-Id: " + request_id + b"\r\n"
    writer.write(b"POST " + path + b" HTTP/1.1\r\nhost: x\r\n" + given)
    writer.write(f"content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)
    head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    lines = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
    return {name.lower(): value for name, _, value in lines}


async def test_a_plain_name_comes_back_and_any_other_is_replaced(gateway: Start) -> None:
    running = await gateway(model("a"))
    assert (await ask(running, b"req-7.a:b"))[b"x-request-id"] == b"req-7.a:b"
    assert (await ask(running, b"req-8", b"/nowhere"))[b"x-request-id"] == b"req-8"
    names = set()
    for evil in [None, *(e for e in EVIL if b"\n" not in e)]:
        name = (await ask(running, evil)).get(b"x-request-id")
        if name is not None:  # else the server did not take the head at all
            assert len(name) == 32
            int(name, 16)
            names.add(name)
    assert len(names) > 3


async def test_each_request_has_its_line_in_the_log(gateway: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await gateway(model("a"))
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, plain, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(stderr),
    )
    try:
        await ask(running, b"one")
        async with running.http.post(running.url + CHAT, data=body("\x1b[2J\n{}")) as response:
            assert response.status == 404
        running.live.apply(running.live.config.model_copy(update={"log_requests": False}))
        await ask(running, b"three")
    finally:
        structlog.configure(**before)
    lines: list[dict[str, Any]] = [json.loads(line) for line in stderr.getvalue().splitlines()]
    told = [line for line in lines if line["event"] == "request"]
    assert [(line["code"], line["model"]) for line in told] == [(200, "a"), (404, None)]
    assert told[0]["request_id"] == "one"
    assert told[0]["took_s"] >= told[0]["first_s"] >= told[0]["queue_s"] >= 0
    assert told[0]["tokens"] == 5
    assert "2J" not in stderr.getvalue()


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[2J", "a\u2028b", "a\r", "\x9b2J", "\ud800"])
def test_what_is_told_is_one_line(text: str) -> None:
    told = plain(None, "info", {"event": text, "path": text, "n": 1})
    assert told["n"] == 1
    for value in (told["event"], told["path"]):
        assert value.isprintable()
        assert value.isascii()
    assert plain(None, "info", {"event": "größer, 大"})["event"] == "größer, 大"


async def test_an_answer_of_an_unforeseen_error_has_its_name(gateway: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await gateway(model("a"))
    monkeypatch.setattr(running.manager, "not_ready", lambda: 1 / 0)
    async with running.http.get(f"{running.url}/ready", headers={"x-request-id": "bad-1"}) as response:
        assert response.status == 500
        assert response.headers["x-request-id"] == "bad-1"


async def test_a_worker_is_told_the_name(gateway: Start) -> None:
    running = await gateway(model("a"))
    await ask(running, b"one")
    status = await running.manager.engine_status("a")
    assert status is not None
    assert status["asked"]["x-request-id"] == "one"
