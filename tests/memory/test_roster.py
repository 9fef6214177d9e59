"""Models come, change and go while others are asked, and no request is lost."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from mball.errors import ConfigError, ModelDoesNotFit, QueueTimeout, UnknownModel
from mball.memory.spec import ModelSpec
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model, post


async def change(running: Running, *specs: ModelSpec) -> str:
    changes = await running.manager.prepare(specs)
    running.manager.change(changes, max_queue=QUICK.max_queue)
    return str(changes)


async def test_what_is_added_is_served_and_what_is_removed_is_not(serve: Serve) -> None:
    running = await serve(model("a"))
    assert (await running.ask("a")).startswith("a")
    [pid] = running.pids
    assert await change(running, model("b")) == "added: b; removed: a"
    assert running.manager.names() == ["b"]
    with pytest.raises(UnknownModel, match="these are: b"):
        await running.ask("a")
    assert (await running.ask("b")).startswith("b")
    await running.until(lambda: [m["name"] for m in running.manager.snapshot()["models"]] == ["b"])
    assert pid not in running.manager.workers()
    assert await change(running, model("b")) == "no model changed"


async def test_who_came_before_is_answered_as_the_model_was_and_who_comes_after_as_it_is(serve: Serve) -> None:
    running = await serve(model("a", Knobs(tokens=2), max_in_flight=1))
    async with running.manager.admit("a", deadline_s=30) as inside:
        waiting = asyncio.create_task(running.ask("a"))
        await running.until(lambda: running.state("a")["queued"] == 1)
        assert await change(running, model("a", Knobs(tokens=3), max_in_flight=1)) == "changed: a"
        after = asyncio.create_task(running.ask("a"))
        await running.until(lambda: running.state("a")["queued"] == 2)
        assert running.state("a")["retired"]
        assert await post(inside) == "a 1 "
    assert await waiting == "a 1 "
    assert await after == "a 1 2 "
    assert not running.state("a")["retired"]
    assert (running.state("a")["starts"], running.manager.snapshot()["books_wrong"]) == (1, [])


async def test_who_waits_for_a_changed_model_is_answered_as_it_is_once_it_comes(serve: Serve) -> None:
    running = await serve(model("a", Knobs(tokens=2)))
    async with running.manager.admit("a", deadline_s=30):
        await change(running, model("a", Knobs(tokens=3)))
        waiting = asyncio.create_task(running.ask("a"))
        await running.until(lambda: running.state("a")["queued"] == 1)
        assert await change(running, model("a", Knobs(tokens=4))) == "changed: a"
        with pytest.raises(QueueTimeout):
            await running.ask("a", deadline_s=0.01)
        assert await change(running) == "removed: a"
        with pytest.raises(UnknownModel):
            await running.ask("a")
    assert await waiting == "a 1 2 3 "
    await running.until(lambda: running.manager.snapshot()["models"] == [])


async def test_one_that_is_there_again_before_it_has_gone_comes_anew(serve: Serve) -> None:
    running = await serve(model("a", Knobs(tokens=2)))
    async with running.manager.admit("a", deadline_s=30) as inside:
        await change(running)
        assert await change(running, model("a", Knobs(tokens=3))) == "added: a"
        again = asyncio.create_task(running.ask("a"))
        assert await post(inside) == "a 1 "
    assert await again == "a 1 2 "


async def test_what_a_worker_need_not_know_changes_where_it_is(serve: Serve) -> None:
    running = await serve(model("a"), model("b"))
    await running.ask("a")
    changed = dataclasses.replace(model("a"), pinned=True, priority=3, keep_alive_s=600.0)
    assert await change(running, changed, model("b")) == "changed: a"
    assert (running.state("a")["pinned"], running.state("a")["retired"]) == (True, False)
    await running.ask("a")
    assert running.state("a")["starts"] == 1
    await running.manager.unpin("a")
    await change(running, dataclasses.replace(changed, priority=4), model("b"))
    assert not running.state("a")["pinned"]


async def test_one_that_failed_is_served_once_it_is_configured_right(serve: Serve) -> None:
    running = await serve(model("a", Knobs(weights_bytes=500 << 20)))
    with pytest.raises(ModelDoesNotFit):
        await running.ask("a")
    await change(running, model("a"))
    assert (await running.ask("a")).startswith("a")


async def test_a_list_that_cannot_be_changes_nothing(serve: Serve) -> None:
    running = await serve(model("a"))
    for specs in ([model("b"), model("b")], [model("b", devices=("cuda:0",))]):
        with pytest.raises(ConfigError):
            await running.manager.prepare(specs)
    assert running.manager.names() == ["a"]
    assert (await running.ask("a")).startswith("a")


async def test_a_removed_model_s_image_goes_with_it(serve: Serve) -> None:
    running = await serve(model("a"), model("b"), dram_bytes=256 << 20)
    await running.ask("a")
    await running.until(lambda: running.state("a")["image_ready"])
    await change(running, model("b"))
    await running.until(lambda: len(running.manager.snapshot()["models"]) == 1)
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0
    assert running.manager.snapshot()["devices"][0]["promised_bytes"] == 0


async def test_a_worker_that_dies_as_it_is_retired_leaves_nothing(serve: Serve) -> None:
    running = await serve(model("a", Knobs(crash_at="stop")), model("b"))
    await running.ask("a")
    await change(running, model("b"))
    await running.until(lambda: len(running.manager.snapshot()["models"]) == 1)
    assert running.manager.snapshot()["devices"][0]["promised_bytes"] == 0
    assert (await running.ask("b")).startswith("b")
