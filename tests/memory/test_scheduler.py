from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from mball.errors import QueueTimeout
from mball.memory import scheduler
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Serve, model
from tests.memory.test_images import status


async def test_a_long_load_goes_through_an_image_and_others_switch_meanwhile(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, hold_s=0.01)
    running = await serve(model("slow", Knobs(image_s=1.5)), model("quick"), dram_bytes=64 * MiB, settings=settings)
    await running.manager.load("quick")
    await running.until(lambda: bool(running.state("quick")["image_ready"]))
    waiting = asyncio.create_task(running.ask("slow"))
    await running.until(lambda: running.state("slow")["image_bytes"] > 0)
    assert running.state("slow")["weights"] == "source"
    assert await running.ask("quick", deadline_s=1.0) == "quick 1 2 3 "
    assert not waiting.done()
    assert await waiting == "slow 1 2 3 "
    assert (await status(running, "slow"))["from_image"]


async def test_where_an_image_can_not_be_filled_the_load_is_from_the_source(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, hold_s=0.01)
    running = await serve(model("a", Knobs(fail_at="image")), dram_bytes=64 * MiB, settings=settings)
    assert await running.ask("a") == "a 1 2 3 "
    assert not (await status(running, "a"))["from_image"]


async def test_a_drain_goes_on_where_the_one_it_began_for_gave_up_and_a_younger_waits(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=0.4, min_stay_s=1000.0, max_stay_s=1000.0)
    running = await serve(model("a"), model("b"), settings=settings)
    await running.ask("b")
    await running.manager.unload("b")
    async with running.manager.admit("a"):
        await asyncio.sleep(0.1)
        first = asyncio.create_task(running.ask("b", deadline_s=1.0))
        await running.until(lambda: not running.state("a")["open"])
        await asyncio.sleep(0.3)
        second = asyncio.create_task(running.ask("b"))
        with pytest.raises(QueueTimeout):
            await first
        # What waits now is not overdue; the door was shut, and stays so.
        for _ in range(5):
            assert not running.state("a")["open"]
            await asyncio.sleep(0.01)
    began = time.monotonic()
    assert await second == "b 1 2 3 "
    assert time.monotonic() - began < 30.0


async def test_a_higher_priority_keeps_its_place_for_a_while(serve: Serve) -> None:
    settings = dataclasses.replace(QUICK, max_wait_s=0.5)
    running = await serve(model("high", priority=1), model("low"), settings=settings)
    await running.ask("low")
    await running.ask("high")
    began = time.monotonic()
    await running.ask("low")
    assert time.monotonic() - began >= 0.5
    began = time.monotonic()
    await running.ask("high")
    assert running.state("high")["weights"] == "device"


async def test_requests_that_pass_an_open_door_are_no_reason_to_decide_anything(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await serve(model("a"), settings=dataclasses.replace(QUICK, sample_s=1000.0))
    await running.ask("a")
    decide, looks = scheduler.decide, []
    monkeypatch.setattr(scheduler, "decide", lambda look, settings: looks.append(look) or decide(look, settings))
    for _ in range(50):
        async with running.manager.admit("a"):
            await asyncio.sleep(0)
    assert len(looks) < 10


async def test_one_that_waits_comes_as_soon_as_the_last_request_before_it_has_left(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_HEARTBEAT_S", 1000.0)
    settings = dataclasses.replace(QUICK, sample_s=1000.0, max_wait_s=1000.0)
    running = await serve(model("a"), model("b"), settings=settings)
    await running.ask("b")
    await running.ask("a")
    async with running.manager.admit("a"):
        waiting = asyncio.create_task(running.ask("b", deadline_s=20.0))
        await running.until(lambda: not running.state("a")["open"])
        assert running.state("b")["weights"] != "device"
    assert await waiting == "b 1 2 3 "
