"""Layers of a real model that streams an answer are taken for another and given back, and no token changes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp

from mball.device.simulated import SimulatedDevice
from mball.memory.queue import Ticket
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.units import MiB
from tests.demo_models import demo_model
from tests.memory.conftest import QUICK, Running, Serve

PROMPT = "The history of the city of Lyon begins with"
LARGE = ModelSpec(
    WorkerSpec(
        "large",
        str(demo_model("smollm2-135m")),
        max_num_seqs=1,
        max_model_len=512,
        kv_cache_bytes=20 * MiB,
        resident_layers="auto",
        # A beginning that was kept is computed in other shapes.
        enable_prefix_caching=False,
        threads=1,
    )
)
OTHER = ModelSpec(
    WorkerSpec("other", str(demo_model("all-minilm-l6-v2")), task="embed"),
    working_bytes=48 * MiB,
    keep_alive_s=0.2,
)
"""Its room is that of several layers, so that some have to move out of the cells that go."""
SETTINGS = dataclasses.replace(QUICK, start_s=120.0, promote_s=60.0, canary_s=60.0, verb_s=10.0, deflate_s=0.3)


async def test_layers_go_and_come_while_an_answer_streams(serve: Serve, device: SimulatedDevice) -> None:
    whole = 350 * MiB
    device = SimulatedDevice.create(device.path.with_name("larger"), whole, context_bytes=1 * MiB)
    running = await serve(LARGE, OTHER, settings=SETTINGS, on=device, command_for=_command)
    await _embed(running)
    await running.until(lambda: running.state("other")["shown_as"] != "device")
    expected = [text async for text in _answer(running)]
    await running.until(lambda: running.state("large")["layer_bytes"] > 0)
    before = running.state("large")

    answer = _answer(running)
    told = [await anext(answer) for _ in range(5)]
    await _embed(running)
    taken = running.state("large")
    assert taken["in_flight"] == 1
    assert taken["ballooned_bytes"] > before["spare_bytes"] + 20 * MiB, "layers, too"
    assert taken["promised_bytes"] == before["promised_bytes"] - taken["ballooned_bytes"]
    assert taken["device_bytes"] <= taken["promised_bytes"]
    told += [await anext(answer) for _ in range(5)]
    await running.until(lambda: running.state("large")["ballooned_bytes"] == 0)
    back = running.state("large")
    assert back["in_flight"] == 1, "it was given back while the answer streamed"
    assert back["promised_bytes"] == before["promised_bytes"]
    told += [text async for text in answer]
    assert "".join(told) == "".join(expected)
    assert running.state("large")["demotions"] == 0
    assert running.manager.snapshot()["books_wrong"] == []
    assert device.refusals == 0


async def test_one_that_turns_out_too_large_whole_streams_from_its_next_start_on(
    serve: Serve, device: SimulatedDevice
) -> None:
    """Its files tell of weights and KV alone, and they would fit."""
    device = SimulatedDevice.create(device.path.with_name("tight"), 280 * MiB, context_bytes=1 * MiB)
    whole = dataclasses.replace(LARGE.worker, resident_layers=None)
    running = await serve(ModelSpec(whole), settings=SETTINGS, on=device, command_for=_command)
    answer = _answer(running)
    assert await anext(answer)
    await answer.aclose()
    state = running.state("large")
    assert (state["starts"], state["shown_as"]) == (2, "device")
    assert state["promised_bytes"] < 280 * MiB
    told = [event for event in running.manager.snapshot()["events"] if event["kind"] == "streams"]
    assert "large: needs 2" in told[0]["reason"]
    assert running.manager.snapshot()["books_wrong"] == []


def _command(spec: ModelSpec) -> list[str]:
    return [sys.executable, "-m", "mball.server.worker"]


async def _answer(running: Running) -> AsyncGenerator[str]:
    """An answer's pieces, as they come."""
    body = {"model": "large", "prompt": PROMPT, "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    async with running.manager.admit("large", deadline_s=120.0) as ticket:
        running.state("large")
        url = "http://worker/v1/completions"
        async with _session(ticket) as session, session.post(url, json={**body, "stream": True}) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                    yield event["choices"][0]["text"]


async def _embed(running: Running) -> None:
    async with running.manager.admit("other", deadline_s=120.0) as ticket:
        running.state("other")
        url, body = "http://worker/v1/embeddings", {"model": "other", "input": "x"}
        async with _session(ticket) as session, session.post(url, json=body) as response:
            assert response.status == 200, await response.text()


def _session(ticket: Ticket) -> aiohttp.ClientSession:
    connector = aiohttp.UnixConnector(ticket.socket_path)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=180.0))
