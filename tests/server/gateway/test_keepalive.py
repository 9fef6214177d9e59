"""A stream that waits for its model is told so, and what fails then is an event of it."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import openai

from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Start
from tests.server.gateway.test_metrics import at, ended


def body(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "a"}], "stream": True, **fields}


async def lines_of(response: aiohttp.ClientResponse) -> list[bytes]:
    return [line for line in (await response.read()).split(b"\n") if line]


async def test_comments_come_until_the_model_is_there(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=0.5)), sse_keepalive_s=0.1)
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a")) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = await lines_of(response)
    comments = [line for line in lines if line.startswith(b":")]
    assert len(comments) >= 2
    assert lines[: len(comments)] == comments
    assert lines[len(comments)].startswith(b"data: {")
    assert lines[-1] == b"data: [DONE]"
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a")) as response:
        assert b":" not in {line[:1] for line in await lines_of(response)}


async def test_a_client_passes_over_them(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=0.5, tokens=3)), sse_keepalive_s=0.05)
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="a", messages=[{"role": "user", "content": "a"}], stream=True
        )
        assert len([chunk async for chunk in stream]) >= 3


async def test_a_failure_after_them_is_an_event(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=1.0, crash_at="canary")), sse_keepalive_s=0.1)
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a")) as response:
        assert response.status == 200
        lines = await lines_of(response)
    last = lines[-1].removeprefix(b"data: ")
    assert json.loads(last)["error"]["message"]


async def test_who_waits_too_long_is_told_by_an_event(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=30)), sse_keepalive_s=0.1, queue_timeout_s=0.5)
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a")) as response:
        assert response.status == 200
        lines = await lines_of(response)
    assert json.loads(lines[-1].removeprefix(b"data: "))["error"]["type"] == "unavailable_error"
    assert at(await ended(running, 1), "mball:requests_total", model_name="a", code="503") == 1


async def test_without_them_it_has_its_status(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=30)), queue_timeout_s=0.5, sse_keepalive_s=None)
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a")) as response:
        assert response.status == 503


async def test_a_worker_s_refusal_after_them_is_an_event(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=0.5, fail_at="request")), sse_keepalive_s=0.1)
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a")) as response:
        assert response.status == 200
        lines = await lines_of(response)
    assert json.loads(lines[-1].removeprefix(b"data: "))["error"]
    found = await ended(running, 1)
    assert at(found, "mball:requests_total", model_name="a", code="200") == 0


async def test_who_asks_for_progress_gets_events_that_say_how_far_it_is(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=1.5)))
    headers = {"X-MBALL-Progress": "1"}
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a"), headers=headers) as response:
        events = (await response.read()).split(b"\n\n")
    told = [event.split(b"\ndata: ") for event in events if event.startswith(b"event: mball.progress\n")]
    assert len(told) >= 2
    assert {name for name, _ in told} == {b"event: mball.progress"}
    last = json.loads(told[-1][1])
    assert (last["model"], last["queued"]) == ("a", 1)
    assert last["expected_s"] >= 1
    assert events[-2:] == [b"data: [DONE]", b""]
    async with running.http.post(f"{running.url}/v1/chat/completions", json=body("a"), headers=headers) as response:
        assert b"mball.progress" not in await response.read()
