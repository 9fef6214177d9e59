"""A manager's swap store: opened beside everything else, and done without where it can't be had."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mball.errors import SwapInUse, SwapMiss, SwapUnavailable
from mball.memory.events import Events
from mball.memory.swap_keeper import SwapKeeper
from mball.swap.check import look
from mball.swap.store import open_store
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Running, Serve, model
from tests.swap.stores import block, content, get, open_at, settings


def swap(running: Running) -> dict[str, Any]:
    state: dict[str, Any] = running.manager.snapshot()["swap"]
    return state


async def until_open(running: Running) -> None:
    await running.until(lambda: swap(running)["state"] == "open")


def warnings(running: Running) -> list[str]:
    return [e["reason"] for e in running.manager.snapshot()["events"] if e["kind"] == "swap unavailable"]


async def test_the_store_is_open_while_the_manager_runs(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "swap"
    running = await serve(model("a"), swap=settings(path))
    await until_open(running)
    assert swap(running)["images"] == swap(running)["blocks"] == 0
    assert str(os.getpid()) in (look(path).held_by or "")
    await running.ask("a")
    worker = running.manager._models["a"].worker
    assert worker is not None
    assert worker.has_swap
    await running.manager.close(1.0)
    assert swap(running)["state"] == "closed"
    assert look(path).held_by is None


async def test_without_the_setting_there_is_none(serve: Serve) -> None:
    running = await serve(model("a"))
    assert await running.ask("a") == "a 1 2 3 "
    assert running.manager.snapshot()["swap"] is None


async def test_a_foreign_file_is_left_as_it_is_and_serving_goes_on(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine " * 10_000)
    before = path.read_bytes(), path.stat().st_mode
    running = await serve(model("a"), swap=settings(path))
    assert await running.ask("a") == "a 1 2 3 "
    await running.until(lambda: bool(warnings(running)))
    [why] = warnings(running)
    assert "not MBALL's" in why
    assert "serving goes on without" in why
    assert swap(running)["state"] == "unavailable"
    await running.manager.close(1.0)
    assert (path.read_bytes(), path.stat().st_mode) == before


async def test_a_second_manager_is_told_who_has_it_and_serves_without(serve: Serve, tmp_path: Path) -> None:
    store = open_at(tmp_path / "swap")
    running = await serve(model("a"), swap=settings(tmp_path / "swap"))
    assert await running.ask("a") == "a 1 2 3 "
    await running.until(lambda: bool(warnings(running)))
    assert f"in use by another MBALL (pid {os.getpid()}" in warnings(running)[0]
    store.close()


async def test_a_disk_without_room_is_done_without(serve: Serve, tmp_path: Path) -> None:
    running = await serve(model("a"), swap=settings(tmp_path / "swap", size_bytes=1 << 60))
    assert await running.ask("a") == "a 1 2 3 "
    await running.until(lambda: bool(warnings(running)))
    assert "free" in warnings(running)[0]
    assert not (tmp_path / "swap").exists()


async def test_a_size_that_makes_no_store_is_done_without(serve: Serve, tmp_path: Path) -> None:
    running = await serve(model("a"), swap=settings(tmp_path / "swap", size_bytes=10))
    await running.until(lambda: bool(warnings(running)))
    assert "no room for a slot" in warnings(running)[0]
    assert await running.ask("a") == "a 1 2 3 "


async def test_closing_while_it_is_being_opened_leaves_no_lock(tmp_path: Path) -> None:
    keeper = SwapKeeper(settings(tmp_path / "swap", size_bytes=64 * MiB), Events())
    opening = asyncio.create_task(keeper.open())
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await keeper.close()
    async with asyncio.timeout(60):
        while True:
            try:
                store = await asyncio.to_thread(open_store, settings(tmp_path / "swap", size_bytes=64 * MiB))
                break
            except (SwapInUse, SwapUnavailable):  # the opening thread has not ended yet
                await asyncio.sleep(0.01)
    store.close()


async def test_a_killed_workers_leases_return(serve: Serve, tmp_path: Path) -> None:
    running = await serve(model("a", Knobs(leases=7)), swap=settings(tmp_path / "swap"))
    await until_open(running)
    await running.ask("a")
    assert swap(running)["leased_slots"] == 7
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    await running.until(lambda: swap(running)["leased_slots"] == 0)
    assert await running.ask("a") == "a 1 2 3 "
    assert swap(running)["leased_slots"] == 7, "the next worker leases its own"


async def test_a_worker_that_was_there_before_the_store_is_given_it(serve: Serve, tmp_path: Path) -> None:
    running = await serve(model("a", Knobs(leases=3)), swap=settings(tmp_path / "swap"))
    keeper, service = running.manager._swap, None
    await until_open(running)
    service, keeper.service = keeper.service, None
    await running.ask("a")
    worker = running.manager._models["a"].worker
    assert worker is not None
    assert not worker.has_swap
    keeper.service = service
    await running.manager._broker.introduce(worker)
    assert worker.has_swap
    assert swap(running)["leased_slots"] == 3


async def test_what_is_in_the_store_is_there_for_the_next_manager(serve: Serve, tmp_path: Path) -> None:
    want = block("kept")
    with_it = open_at(tmp_path / "swap")
    with_it.put(want, content("kept", want.nbytes))
    with_it.close()
    running = await serve(model("a"), swap=settings(tmp_path / "swap"))
    await until_open(running)
    assert swap(running)["blocks"] == 1
    await running.manager.close(1.0)
    again = open_at(tmp_path / "swap")
    assert get(again, want) == content("kept", want.nbytes)
    with pytest.raises(SwapMiss):
        get(again, block("other"))
    again.close()
