"""The gateway's routes, over fake workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start

CHAT = "/v1/chat/completions"


def body(name: str, **fields: Any) -> bytes:
    return json.dumps({"model": name, "messages": [], **fields}).encode()


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    answer = await response.json()
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = answer["error"]
    return error


async def test_a_worker_s_bytes_come_back_as_they_are(gateway: Start) -> None:
    running = await gateway(model("a"))
    async with running.http.post(running.url + CHAT, data=body("a")) as response:
        through = await response.read()
        assert response.status == 200
    async with running.manager.admit("a", deadline_s=30) as ticket:
        connector = aiohttp.UnixConnector(ticket.socket_path)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(
                "http://worker" + CHAT, data=body("a"), headers={"content-type": "application/json"}
            ) as direct,
        ):
            assert await direct.read() == through
            assert direct.headers["content-type"] == response.headers["content-type"]


async def test_models_take_turns_and_each_answers_as_itself(gateway: Start) -> None:
    running = await gateway(*(model(name) for name in "abc"))

    async def ask(name: str) -> None:
        async with running.http.post(running.url + CHAT, data=body(name)) as response:
            answer = await response.json()
            assert answer["choices"][0]["message"]["content"].startswith(name)

    await asyncio.gather(*(ask(name) for name in "abc" * 4))


async def test_a_stream_arrives_as_it_is_made(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(tokens=3, token_s=0.3)))
    async with running.http.post(running.url + CHAT, data=body("a", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first = await response.content.readline()
        assert first.startswith(b"data: ")
        assert running.state("a")["in_flight"] == 1
        rest = await response.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", CHAT, 405),
        ("POST", "/sleep", 404),
        ("POST", "/v1/chat/../../collective_rpc", 404),
        ("POST", "/docs", 404),
    ],
)
async def test_only_listed_paths_exist(gateway: Start, method: str, path: str, status: int) -> None:
    running = await gateway(model("a"))
    async with running.http.request(method, running.url + path, data=body("a")) as response:
        assert response.status == status
        assert (await error_of(response))["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b'{"model": "a", "model": "a"}', 400, "stands twice"),
        (b'{"model": "a", "temperature": NaN}', 400, "NaN"),
        (b'{"messages": []}', 400, "`model`"),
        (b'{"model": 3}', 400, "`model`"),
        (b'{"model": "a", "stream": "yes"}', 400, "`stream`"),
        (b'{"model": "b"}', 404, "not served here"),
        (b'{"model": "a", "x": "' + b"x" * 64 * 1024 + b'"}', 413, "max_body_bytes"),
    ],
)
async def test_what_is_no_request_is_refused(gateway: Start, data: bytes, status: int, says: str) -> None:
    running = await gateway(model("a"), max_body_bytes=64 * 1024)
    async with running.http.post(running.url + CHAT, data=data) as response:
        assert response.status == status
        assert says in (await error_of(response))["message"]
    assert running.state("a")["starts"] == 0


async def test_an_endless_body_is_refused_while_it_arrives(gateway: Start) -> None:
    running = await gateway(model("a"), max_body_bytes=MiB)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1024 * MiB:
            sent += 64 * 1024
            yield b" " * 64 * 1024

    try:
        async with running.http.post(running.url + CHAT, data=endless()) as response:
            assert response.status == 413
    except aiohttp.ClientConnectionError:
        pass  # closed in the sender's face
    assert sent < 64 * MiB


async def test_a_worker_that_dies_before_the_first_byte_is_a_503_with_retry_after(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(crash_at="request")))
    async with running.http.post(running.url + CHAT, data=body("a")) as response:
        assert response.status == 503
        assert int(response.headers["retry-after"]) >= 1
        assert (await error_of(response))["type"] == "unavailable_error"


async def test_a_request_that_did_not_reach_its_worker_goes_to_the_next(gateway: Start) -> None:
    running = await gateway(model("a"))
    await running.manager.load("a")
    socket = Path(running.manager._model("a").queue._socket_path or "")
    socket.rename(socket.with_suffix(".gone"))
    asking = asyncio.create_task(running.http.post(running.url + CHAT, data=body("a")))
    await running.until(lambda: running.state("a")["in_flight"] == 1)
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    response = await asking
    assert response.status == 200
    assert (await response.json())["choices"][0]["message"]["content"] == "a 1 2 3 "
    assert running.state("a")["starts"] == 2


async def test_a_worker_that_dies_in_a_stream_ends_it_with_an_error_event(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(tokens=1000, token_s=0.05)))
    async with running.http.post(running.url + CHAT, data=body("a", stream=True)) as response:
        await response.content.readline()
        os.kill(running.state("a")["pid"], signal.SIGKILL)
        events = (await response.content.read()).split(b"\n\n")
    assert events[-1] == b""
    assert "its worker ended" in json.loads(events[-2].strip().removeprefix(b"data: "))["error"]["message"]


async def test_a_worker_that_dies_after_the_last_event_of_a_stream_ends_it_once(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(crash_at="done")))
    async with running.http.post(running.url + CHAT, data=body("a", stream=True)) as response:
        events = (await response.content.read()).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert not any(b"error" in event for event in events)


async def test_a_worker_that_dies_in_a_whole_answer_leaves_no_half_of_it(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(tokens=1000, token_s=0.05)))
    asking = asyncio.create_task(running.http.post(running.url + CHAT, data=body("a")))
    await running.until(lambda: running.state("a")["in_flight"] == 1)
    # One that has not reached its worker yet would go to the next.
    async with asyncio.timeout(30):
        while not (await running.manager.engine_status("a") or {})["in_flight"]:
            pass
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    async with await asking as response:
        assert response.status == 503


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_while_waiting_or_served_is_forgotten(gateway: Start, stream: bool) -> None:
    running = await gateway(model("a", Knobs(tokens=1000, token_s=0.05)), model("b"))
    asking = {}
    for name, waits_in in (("a", "in_flight"), ("b", "queued")):
        request = running.http.post(running.url + CHAT, data=body(name, stream=stream))
        asking[name] = asyncio.create_task(request)
        await running.until(lambda name=name, waits_in=waits_in: running.state(name)[waits_in] == 1)
    for name in ("b", "a"):
        if asking[name].done():
            (await asking[name]).close()
        asking[name].cancel()
    await running.until(lambda: running.state("a")["in_flight"] == 0 and running.state("b")["queued"] == 0)


async def test_a_request_that_waits_too_long_is_told_when_to_come_again(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(start_s=5.0)), queue_timeout_s=0.2)
    async with running.http.post(running.url + CHAT, data=body("a")) as response:
        assert response.status == 503
        assert (await error_of(response))["code"] == "queue_timeout"
        assert int(response.headers["retry-after"]) >= 1


async def test_an_answer_that_takes_too_long_ends(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(hang_at="request")), request_timeout_s=2.0)
    async with running.http.post(running.url + CHAT, data=body("a")) as response:
        assert response.status == 503
        assert "no whole answer" in (await error_of(response))["message"]
        assert int(response.headers["retry-after"]) >= 1
    await running.until(lambda: running.state("a")["in_flight"] == 0)


async def test_a_draining_server_refuses_and_finishes(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(tokens=4, token_s=0.2)))
    async with running.http.get(running.url + "/ready") as response:
        assert response.status == 200
    async with running.http.post(running.url + CHAT, data=body("a", stream=True)) as under_way:
        await under_way.content.readline()
        running.manager.begin_drain()
        async with running.http.post(running.url + CHAT, data=body("a")) as response:
            assert response.status == 503
            assert (await error_of(response))["code"] == "shutting_down"
        async with running.http.get(running.url + "/ready") as response:
            assert response.status == 503
        async with running.http.get(running.url + "/health") as response:
            assert response.status == 200
        assert (await under_way.content.read()).endswith(b"data: [DONE]\n\n")


async def test_adapters_are_models_that_their_model_serves(gateway: Start) -> None:
    given = model("a")
    worker = replace(given.worker, engine="vllm", engine_args={"lora_modules": ["a-formal=/f", "a-brief=/b"]})
    running = await gateway(replace(given, worker=worker), model("c"))
    async with running.http.get(running.url + "/v1/models") as response:
        cards = (await response.json())["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [
        ("a", None),
        ("c", None),
        ("a-formal", "a"),
        ("a-brief", "a"),
    ]
    async with running.http.get(running.url + "/v1/models/a-brief") as response:
        assert (await response.json())["parent"] == "a"
    async with running.http.post(running.url + CHAT, data=body("a-brief")) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"].startswith("a ")
    assert running.state("a")["shown_as"] == "device"
    async with running.http.post(running.url + CHAT, data=body("a-other")) as response:
        assert response.status == 404


async def test_models_are_listed_and_moved(gateway: Start) -> None:
    running = await gateway(model("a"), model("team/b"))

    async def call(method: str, path: str, status: int = 200) -> dict[str, Any]:
        async with running.http.request(method, running.url + path) as response:
            assert response.status == status, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    assert [card["id"] for card in (await call("GET", "/v1/models"))["data"]] == ["a", "team/b"]
    assert (await call("GET", "/v1/models/team/b"))["id"] == "team/b"
    assert "error" in await call("GET", "/v1/models/c", 404)
    assert (await call("POST", "/mball/v1/models/team/b/load"))["shown_as"] == "device"
    assert (await call("POST", "/mball/v1/models/team/b/pin"))["pinned"] is True
    assert (await call("GET", "/mball/v1/models/team/b"))["engine"]["resident"] is True
    assert (await call("GET", "/mball/v1/models/a"))["engine"] is None
    assert (await call("POST", "/mball/v1/models/team/b/unpin"))["pinned"] is False
    assert (await call("POST", "/mball/v1/models/team/b/unload"))["weights"] != "device"
    assert "error" in await call("POST", "/mball/v1/models/c/load", 404)
    assert (await call("GET", "/mball/v1/state"))["promotions"] == 1


async def test_concurrent_requests_for_a_loaded_model_do_not_wait_for_another_s_load(gateway: Start) -> None:
    small = {"weights_bytes": 16 * MiB, "kv_bytes": 1 * MiB}
    running = await gateway(model("a", Knobs(**small)), model("slow", Knobs(promote_s=5.0, **small)))
    await running.manager.load("a")
    loading = asyncio.create_task(running.manager.load("slow"))
    await running.until(lambda: running.state("slow")["process"] == "alive")
    gw: Gateway = running
    async with gw.http.post(gw.url + CHAT, data=body("a")) as response:
        assert response.status == 200
        assert gw.state("slow")["weights"] != "device"
    await loading
