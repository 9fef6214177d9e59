"""The stream of events and the balloon's route, over fake workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start

SOFT = Knobs(weights_bytes=40 * MiB, kv_bytes=32 * MiB, balloons=True)


async def read(response: aiohttp.ClientResponse, until: str) -> list[dict[str, Any]]:
    """Events up to the first of that kind, as (type, id, data) in one."""
    found: list[dict[str, Any]] = []
    event: dict[str, Any] = {}
    async with asyncio.timeout(30):
        async for raw in response.content:
            name, _, value = raw.decode().rstrip("\r\n").partition(": ")
            if name in ("event", "id"):
                event[name] = value
            elif name == "data":
                found.append({**event, "data": json.loads(value)})
                event = {}
                if found[-1].get("event") == until:
                    return found
    return found


async def follow(running: Gateway, **options: Any) -> aiohttp.ClientResponse:
    response = await running.http.get(running.url + "/mball/v1/events", **options)
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return response


async def test_what_happens_is_told_and_resumed(gateway: Start) -> None:
    running = await gateway(model("a"), model("b"))
    stream = await follow(running)
    await running.manager.load("a")
    first = await read(stream, "promoted")
    assert [event["event"] for event in first] == ["started", "promoted"]
    assert first[-1]["data"]["model"] == "a"
    assert first[-1]["data"]["reason"].startswith("1 waiting")
    stream.close()
    await running.manager.load("b")
    resumed = await follow(running, headers={"last-event-id": first[-1]["id"]})
    found = await read(resumed, "promoted")
    assert {"demoted", "promoted"} <= {event["event"] for event in found}
    demoted = next(event for event in found if event["event"] == "demoted")
    assert "80.0 MiB for b: " in demoted["data"]["reason"]
    assert "is the lowest" in demoted["data"]["reason"]
    numbers = [event["data"]["number"] for event in first + found]
    assert numbers == list(range(1, len(numbers) + 1)), "nothing twice, nothing missing"
    resumed.close()
    strange = await follow(running, headers={"last-event-id": "another-7"}, params={"recent": "1"})
    assert (await read(strange, "missed"))[0]["data"]["missed"] >= 1
    strange.close()


async def test_followers_do_not_hold_the_end_up(gateway: Start) -> None:
    running = await gateway(model("a"))
    stream = await follow(running, params={"recent": "5"})
    running.manager.begin_drain()
    assert (await read(stream, "never"))[-1]["event"] == "draining"


async def test_one_who_left_is_forgotten(gateway: Start) -> None:
    running = await gateway(model("a"))
    others = set(running.manager.events._followers)
    stream = await follow(running)
    await running.until(lambda: len(running.manager.events._followers) == len(others) + 1)
    stream.close()
    await running.until(lambda: running.manager.events._followers == others)


async def test_the_balloon_by_http(gateway: Start) -> None:
    running = await gateway(model("a", SOFT))
    await running.manager.load("a")
    url = running.url + "/mball/v1/models/a/balloon"
    async with running.http.post(url, json={"bytes": "8MiB"}) as response:
        assert response.status == 200
        state = await response.json()
    assert (state["ballooned_bytes"], state["device_bytes"]) == (8 * MiB, 65 * MiB)
    assert state["last_event"]["kind"] == "ballooned"
    async with running.http.post(url, json={"bytes": 0}) as response:
        assert (await response.json())["ballooned_bytes"] == 0


@pytest.mark.parametrize(
    "body", ["{}", '{"bytes": -1}', '{"bytes": "much"}', '{"bytes": "1TiB"}', "[", '{"bytes": 1.5}']
)
async def test_what_is_no_size_is_refused(gateway: Start, body: str) -> None:
    running = await gateway(model("a", SOFT))
    await running.manager.load("a")
    async with running.http.post(running.url + "/mball/v1/models/a/balloon", data=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"
    async with running.http.post(running.url + "/mball/v1/models/b/balloon", json={"bytes": 1}) as response:
        assert response.status == 404
