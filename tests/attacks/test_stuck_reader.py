"""A client that asks for a stream and never reads it (fault 6)."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from mball.server.gateway.protocol import Protocol
from tests.fake_worker import Knobs
from tests.memory.conftest import device, model, runtime_dir
from tests.server.gateway.conftest import Start, gateway

__all__ = ["device", "gateway", "runtime_dir"]


async def test_a_reader_that_stops_reading_is_cut_off_and_its_slot_is_free(
    gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "send_s", 0.5)
    running = await gateway(model("a", Knobs(tokens=10_000_000)))
    reader, writer = await asyncio.open_connection(*running.address, limit=1)
    body = json.dumps({"model": "a", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await running.until(lambda: running.state("a")["in_flight"] == 1)
    await running.until(lambda: running.state("a")["in_flight"] == 0)
    with contextlib.suppress(ConnectionError):
        assert not (await reader.read()).endswith(b"0\r\n\r\n")
    writer.close()
    async with running.http.post(running.url + "/v1/embeddings", json={"model": "a", "input": "x"}) as response:
        assert response.status == 200
