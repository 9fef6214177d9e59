from __future__ import annotations

import asyncio
import json

import aiohttp

from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Start


async def test_the_end_of_a_models_log(gateway: Start) -> None:
    running = await gateway(model("a", Knobs()))
    async with running.http.post(f"{running.url}/mball/v1/models/a/load") as response:
        assert response.status == 200
    async with running.http.get(f"{running.url}/mball/v1/models/a/log") as response:
        assert response.headers["content-type"].startswith("text/plain")
        assert await response.text() == "fake worker a, started"
    async with running.http.get(f"{running.url}/mball/v1/models/b/log") as response:
        assert response.status == 404


async def test_a_models_log_as_it_is_written(gateway: Start) -> None:
    running = await gateway(model("a", Knobs()), model("b"))
    stream = f"{running.url}/mball/v1/models/a/log/stream"
    async with running.http.get(f"{running.url}/mball/v1/models/c/log/stream") as response:
        assert response.status == 404
    async with asyncio.timeout(60), running.http.get(stream) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        await running.manager.load("a")
        assert await next_line(response) == "fake worker a, started"
        log = running.manager._log_dir / "a.log"
        log.replace(log.with_name("a.log.1"))
        log.write_bytes(b"half")
        with log.open("ab") as file:
            file.write(b" a line\xff\nand one\n")
        assert [await next_line(response), await next_line(response)] == ["half a line\ufffd", "and one"]
        running.manager.begin_drain()
        while await response.content.readline():
            pass


async def next_line(response: aiohttp.ClientResponse) -> str:
    while not (line := await response.content.readline()).startswith(b"data: "):
        assert line
    text: str = json.loads(line.removeprefix(b"data: "))
    return text
