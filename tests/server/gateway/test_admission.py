"""Who enters when, for how long, and what those are told who do not."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import openai
import pytest

from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start
from tests.server.gateway.test_access import USER, bearer, entry
from tests.server.gateway.test_app import CHAT, body, error_of

SLOW = Knobs(tokens=10_000, token_s=0.05)
"""It answers for minutes: what ends sooner was ended."""


@contextlib.asynccontextmanager
async def asked(running: Gateway, name: str, **fields: Any) -> Any:
    """A request under way, that is given up at the end."""
    task = asyncio.create_task(running.http.post(running.url + CHAT, data=body(name, **fields)))
    try:
        yield task
    finally:
        if not task.cancel():
            task.result().close()
        await asyncio.wait({task})


async def test_as_many_wait_for_a_model_as_may_and_the_next_is_told_when_to_come(gateway: Start) -> None:
    running = await gateway(model("a", SLOW, max_in_flight=1, max_queue=1), model("b", Knobs()))
    running.manager._model("a").queue.service_s.add(40.0)
    async with asked(running, "a"):
        await running.until(lambda: running.state("a")["in_flight"] == 1)
        async with asked(running, "a"):
            await running.until(lambda: running.state("a")["queued"] == 1)
            async with running.http.post(running.url + CHAT, data=body("a")) as response:
                assert response.status == 503
                assert (await error_of(response))["code"] == "queue_full"
                # One is answered, one waits: each takes 40 s, as was measured.
                assert int(response.headers["retry-after"]) == 80


async def test_the_lowest_priority_is_answered_first(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(promote_s=1.0), max_in_flight=1))
    order = []

    async def ask(name: str, headers: dict[str, str], **fields: Any) -> None:
        async with running.http.post(running.url + CHAT, data=body("a", **fields), headers=headers) as response:
            assert response.status == 200
            order.append(name)

    tasks = []
    for number, (name, headers, fields) in enumerate(
        (("plain", {}, {}), ("later", {"x-request-priority": "3"}, {}), ("first", {}, {"priority": -1}))
    ):
        tasks.append(asyncio.create_task(ask(name, headers, **fields)))
        await running.until(lambda count=number + 1: running.state("a")["queued"] == count)
    await asyncio.gather(*tasks)
    assert order == ["first", "plain", "later"]


async def test_a_key_s_requests_go_no_further_ahead_than_it_may(gateway: Start) -> None:
    running = await gateway(model("a"), api_keys=[entry(USER, "user", limits={"priority": 2})])
    for given, status in ((1, 403), (2, 200), (7, 200), (None, 200)):
        async with running.http.post(
            running.url + CHAT, data=body("a", priority=given), headers=bearer(USER)
        ) as response:
            assert response.status == status
            assert status == 200 or (await error_of(response))["param"] == "priority"


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_time_that_is_none_is_refused(gateway: Start, header: str) -> None:
    running = await gateway(model("a"))
    for name in ("x-request-timeout", "x-request-priority"):
        if name.endswith("priority") and header in ("0", "-1"):
            continue
        async with running.http.post(running.url + CHAT, data=body("a"), headers={name: header}) as response:
            assert response.status == 400
            assert (await error_of(response))["param"] == name


async def test_a_request_s_own_deadline_ends_it_where_it_waits(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(start_s=20.0)))
    headers = {"x-request-timeout": "0.2"}
    async with running.http.post(running.url + CHAT, data=body("a"), headers=headers) as response:
        assert response.status == 504
        error = await error_of(response)
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert "waited for its model" in error["message"]
    assert running.state("a")["queued"] == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_s_own_deadline_ends_it_where_it_is_answered(gateway: Start, stream: bool) -> None:
    running = await gateway(model("a", SLOW))
    await running.manager.load("a")
    headers = {"x-request-timeout": "1"}
    async with running.http.post(running.url + CHAT, data=body("a", stream=stream), headers=headers) as response:
        assert response.status == (200 if stream else 504)
        assert b"deadline_exceeded" in (await response.read())[-300:]
    await until_the_worker_has(running, "a", 0)


@pytest.mark.parametrize("where", ["queue", "bring-in", "stream"])
async def test_who_leaves_is_let_go_at_once(gateway: Start, where: str) -> None:
    running = await gateway(model("a", SLOW if where != "bring-in" else Knobs(promote_s=60.0), max_in_flight=1))
    async with contextlib.AsyncExitStack() as others:
        if where == "queue":
            await others.enter_async_context(asked(running, "a"))
            await running.until(lambda: running.state("a")["in_flight"] == 1)
        async with asked(running, "a", stream=True) as task:
            if where == "stream":
                await (await task).content.readline()
            else:
                await running.until(lambda: running.state("a")["queued"] == 1)
            if where == "bring-in":
                await running.until(lambda: running.state("a")["process"] == "alive")
        await running.until(lambda: running.state("a")["queued"] == 0)
        if where == "stream":
            await running.until(lambda: running.state("a")["in_flight"] == 0)
            await until_the_worker_has(running, "a", 0)


async def until_the_worker_has(running: Gateway, name: str, count: int) -> None:
    async with asyncio.timeout(30):
        while (await running.manager.engine_status(name) or {})["in_flight"] != count:
            pass


async def test_a_client_of_openai_s_sees_its_deadline_as_a_timeout(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(start_s=20.0)))
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="a", messages=[], extra_headers={"X-Request-Timeout": "0.2"})
    assert refused.value.status_code == 504
