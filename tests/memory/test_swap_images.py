"""The rung below DRAM: images written to the swap store once, and weights that come back from there."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from mball.memory.pressure_watch import Gauge
from mball.memory.settings import Settings
from mball.memory.spec import ModelSpec
from mball.memory.swap_images import MODEL
from mball.swap.book import Want
from mball.swap.index import Kind
from mball.swap.place import digest
from mball.swap.service import SwapService
from mball.swap.store import Settings as SwapSettings
from mball.units import GiB, KiB, MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Running, Serve, model
from tests.swap.stores import settings

EASY = dataclasses.replace(QUICK, pressure_s=0.05, calm_s=0.1, host_reserve_bytes=100 * MiB)
ALWAYS = dataclasses.replace(EASY, swap_weights="always")
IMAGE = 8 * MiB
SLOT = 256 * KiB
ONE = 12 * MiB
"""DRAM for one image."""
PLENTY = 10 * GiB

Begin = Callable[..., Awaitable[Running]]

SLOW = Knobs(weights_bytes=IMAGE, kv_bytes=60 * MiB, promote_s=0.3)


def store(path: Path, **changed: object) -> SwapSettings:
    return settings(path, **{"size_bytes": 40 * MiB, "slot_bytes": SLOT, **changed})


def service(running: Running) -> SwapService:
    found = running.manager._swap.service
    assert found is not None
    return found


def counters(running: Running) -> dict[str, int]:
    found: dict[str, int] = service(running).store.status()["counters"]
    return found


def events(running: Running, kind: str, name: str | None = None) -> list[dict[str, Any]]:
    recent = [event.as_dict() for event in running.manager.events.recent(1024)]
    return [event for event in recent if event["kind"] == kind and name in (None, event["model"])]


def came_from(running: Running, name: str) -> str:
    """Where its last promotion had the weights from."""
    found: str = events(running, "promoted", name)[-1]["weights_from"]
    return found


@pytest.fixture
def begin(serve: Serve, tmp_path: Path) -> Begin:
    """`await begin(model…)`: a running manager with a swap store, on a host that is short of memory when told to be."""

    async def start(*models: ModelSpec, policy: Settings = ALWAYS, opened: str = "open", **options: Any) -> Running:
        host = [PLENTY]
        gauge = Gauge(tmp_path / "none", available=lambda: host[0])
        options = {"dram_bytes": ONE, "swap": store(tmp_path / "swap"), **options}
        running = await serve(*models, settings=policy, gauge=gauge, **options)
        hosts[running] = host
        await running.until(lambda: running.manager.snapshot()["swap"]["state"] == opened)
        return running

    return start


hosts: WeakKeyDictionary[Running, list[int]] = WeakKeyDictionary()


async def relax(running: Running) -> None:
    """There is room for images again."""
    hosts[running][0] = PLENTY
    ledger = running.manager._images.ledger
    await running.until(lambda: ledger.limit_bytes == ledger.total_bytes)


async def ready(running: Running, name: str) -> None:
    """Its image is in DRAM, where there is room for it."""
    await relax(running)
    await running.until(lambda: bool(running.state(name)["image_ready"]))


async def put_away(running: Running, name: str) -> None:
    """Takes a model off the device, and its image out of DRAM, where there is no room from then on."""
    await ready(running, name)
    if running.state(name)["shown_as"] == "device":
        await running.manager.unload(name)
    before = len(events(running, "image dropped", name))
    hosts[running][0] = 0
    await running.until(lambda: len(events(running, "image dropped", name)) > before)
    assert running.state(name)["image_bytes"] == 0


async def test_the_image_that_leaves_dram_goes_to_the_store_and_comes_back_from_there(
    begin: Begin, tmp_path: Path
) -> None:
    running = await begin(model("rare", SLOW), model("often", SLOW))
    await running.ask("rare")
    await ready(running, "rare")
    for _ in range(9):
        await running.ask("often")
    await ready(running, "often")
    rare = running.state("rare")
    assert (rare["shown_as"], rare["weights"], rare["image_bytes"], rare["stored"]) == ("nvme", "nvme", 0, True)
    state = running.manager.snapshot()
    assert (state["dram"]["image_bytes"], state["swap"]["images"]) == (IMAGE, 1)
    assert events(running, "image stored", "rare")[0]["written_bytes"] > IMAGE
    assert await running.ask("rare") == "rare 1 2 3 "
    assert came_from(running, "rare") == "nvme"
    assert running.manager._models["rare"].figures.promote_s["nvme"].value is not None  # type: ignore[index]
    assert state["books_wrong"] == []
    assert not events(running, "image missed")


async def test_a_second_demotion_writes_nothing(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    before = counters(running)
    assert before["writes"] == 1
    for times in range(1, 4):
        assert await running.ask("a") == "a 1 2 3 "
        assert came_from(running, "a") == "nvme"
        await put_away(running, "a")
        assert running.state("a")["shown_as"] == "nvme"
        assert len(events(running, "image dropped", "a")) == times + 1
    after = counters(running)
    assert (after["writes"], after["written_bytes"]) == (before["writes"], before["written_bytes"])
    assert len(events(running, "image stored")) == 1
    assert [event["filled_from"] for event in events(running, "image ready")] == ["source", "nvme", "nvme", "nvme"]


async def test_models_of_the_same_content_share_what_is_stored(begin: Begin, tmp_path: Path) -> None:
    same = dataclasses.replace(SLOW, content="the same")
    running = await begin(model("a", same), model("b", same), dram_bytes=2 * ONE)
    for name in "ab":
        await running.ask(name)
        await put_away(running, name)
    assert counters(running)["writes"] == 1
    await running.ask("a")
    assert came_from(running, "a") == "nvme"


@pytest.mark.parametrize(("policy", "content"), [("never", ""), ("always", "-")])
async def test_what_is_not_to_be_stored_comes_back_from_its_files(
    begin: Begin, tmp_path: Path, policy: Any, content: str
) -> None:
    knobs = dataclasses.replace(SLOW, content=content)
    chosen = dataclasses.replace(EASY, swap_weights=policy)
    running = await begin(model("a", knobs), policy=chosen)
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "source"
    assert running.manager.snapshot()["swap"]["images"] == 0
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == "source"


async def test_where_the_files_are_as_fast_they_are_the_swap(begin: Begin, tmp_path: Path) -> None:
    here = model("here", SLOW)
    here = dataclasses.replace(here, worker=dataclasses.replace(here.worker, path=str(tmp_path)))
    running = await begin(here, model("there", SLOW), policy=EASY, dram_bytes=2 * ONE)
    found, read_rate = running.manager._models, running.manager._images.swap.read_rate
    for name, source_rate, stored in (("here", 1e6, False), ("there", 2e9, False), ("there", 1e6, True)):
        await running.ask(name)
        await ready(running, name)
        found[name].figures.source_rate.value, read_rate.value = source_rate, 1e9
        await put_away(running, name)
        assert running.state(name)["stored"] == stored, (name, source_rate)
    await running.ask("there")
    assert came_from(running, "there") == "nvme"


async def test_an_image_of_an_engines_own_memory_is_written_once_and_goes_with_its_worker(
    begin: Begin, tmp_path: Path
) -> None:
    """On the disk that its files are on, too: it is not what they are."""
    own = model("a", SLOW)
    own = dataclasses.replace(
        own, worker=dataclasses.replace(own.worker, engine="vllm", kv_cache_bytes=60 * MiB, path=str(tmp_path))
    )
    running = await begin(own, policy=EASY)
    assert running.manager._models["a"].image_key is None
    await running.ask("a")
    await put_away(running, "a")
    assert running.manager._models["a"].figures.source_rate.value is None
    before = counters(running)
    assert before["writes"] == 1
    for _ in range(2):
        assert running.state("a")["shown_as"] == "nvme"
        assert await running.ask("a") == "a 1 2 3 "
        assert came_from(running, "a") == "nvme"
        await put_away(running, "a")
    assert counters(running)["writes"] == 1
    # It comes back to DRAM while its engine sleeps, too.
    await relax(running)
    await running.ask("a")
    await ready(running, "a")
    assert events(running, "image ready", "a")[-1]["filled_from"] == "nvme"
    await put_away(running, "a")
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    await running.until(lambda: running.state("a")["process"] == "gone")
    assert (running.state("a")["shown_as"], running.state("a")["stored"]) == ("stopped", False)
    await relax(running)
    assert await running.ask("a") == "a 1 2 3 "
    await put_away(running, "a")
    assert counters(running)["writes"] == 2
    assert not events(running, "image missed")
    assert running.manager.snapshot()["books_wrong"] == []


async def test_a_rate_that_was_never_measured_does_not_keep_an_image_out(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW), policy=EASY)
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["stored"]
    rate = running.manager._models["a"].figures.source_rate.value
    assert rate is not None
    assert rate > 0


def damage(running: Running, name: str) -> None:
    """One bit of the image, on the disk."""
    found = service(running).store
    key = running.manager._models[name].image_key
    assert key is not None
    place = found.find(key, MODEL)
    slot = next(place.runs(place.slots // 2, 1, 1)).slot
    fd = os.open(found.settings.path, os.O_RDWR)
    at = found.layout.slot_at(slot) + 4 * KiB + 77
    byte = os.pread(fd, 1, at)[0]
    os.pwrite(fd, bytes([byte ^ 1]), at)
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize("prefetched", [False, True])
async def test_a_flipped_byte_is_a_miss_and_the_files_are_read(begin: Begin, tmp_path: Path, prefetched: bool) -> None:
    policy = dataclasses.replace(ALWAYS, hold_s=0.0 if prefetched else 60.0)
    running = await begin(model("a", SLOW), policy=policy)
    await running.ask("a")
    await put_away(running, "a")
    damage(running, "a")
    if prefetched:
        await relax(running)
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == ("dram" if prefetched else "source")
    assert len(events(running, "image missed", "a")) == 1
    assert counters(running)["misses:checksum"] == 1
    assert not running.state("a")["stored"]
    if prefetched:
        assert events(running, "image ready", "a")[-1]["filled_from"] == "source"
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "nvme", "it is written anew"
    if prefetched:
        await relax(running)
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == ("dram" if prefetched else "nvme")
    assert (running.manager.snapshot()["crashes"], running.manager.snapshot()["books_wrong"]) == (0, [])


async def test_a_long_load_comes_by_way_of_dram(begin: Begin, tmp_path: Path) -> None:
    policy = dataclasses.replace(ALWAYS, hold_s=0.0)
    running = await begin(model("a", SLOW), policy=policy)
    await running.ask("a")
    await put_away(running, "a")
    await relax(running)
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == "dram"
    assert events(running, "image ready", "a")[-1]["filled_from"] == "nvme"


async def test_what_waits_for_another_to_leave_comes_to_dram_meanwhile(begin: Begin, tmp_path: Path) -> None:
    busy = dataclasses.replace(SLOW, token_s=1.0, tokens=4)
    policy = dataclasses.replace(ALWAYS, max_wait_s=0.0, hold_s=60.0)
    running = await begin(model("a", SLOW), model("busy", busy), policy=policy, dram_bytes=2 * ONE)
    await running.ask("a")
    await put_away(running, "a")
    answering = asyncio.create_task(running.ask("busy"))
    await running.until(lambda: running.state("busy")["in_flight"] == 1)
    hosts[running][0] = PLENTY
    asking = asyncio.create_task(running.ask("a"))
    await ready(running, "a")
    assert not answering.done(), "the other still answers"
    assert running.state("a")["shown_as"] == "dram"
    assert await answering == "busy 1 2 3 "
    assert await asking == "a 1 2 3 "
    assert came_from(running, "a") == "dram"


async def test_an_image_that_is_fetched_is_given_up_where_host_memory_is_short(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    found, images = running.manager._models["a"], running.manager._images
    disk, go, begun = service(running).store.slots.disk, threading.Event(), threading.Event()
    preadv = disk.preadv

    def late(parts: Sequence[memoryview], at: int) -> int:
        begun.set()
        go.wait(60)
        return preadv(parts, at)

    monkeypatch.setattr(disk, "preadv", late)
    running.manager._images.ledger.limit(ONE)
    keeping = images.keep(found, [found], 0.0)
    assert keeping is not None
    assert await asyncio.to_thread(begun.wait, 60)
    await images.drop(found, "short")
    await keeping
    assert not events(running, "image ready", "a")[1:]
    go.set()
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0
    assert running.state("a")["shown_as"] == "nvme"
    assert await running.ask("a") == "a 1 2 3 "


async def test_what_the_store_evicts_falls_to_its_files(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    key = running.manager._models["a"].image_key
    assert key is not None
    service(running).drop_image(key)
    running.manager._wake()
    await running.until(lambda: running.state("a")["shown_as"] == "source")
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == "source"


async def test_a_killed_worker_comes_back_from_the_store(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    os.kill(running.state("a")["pid"], signal.SIGKILL)
    await running.until(lambda: running.state("a")["process"] == "gone")
    assert running.state("a")["shown_as"] == "nvme"
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == "nvme"


async def test_a_worker_that_dies_while_it_reads_the_store_leaves_it_whole(begin: Begin, tmp_path: Path) -> None:
    knobs = dataclasses.replace(SLOW, crash_at="promote", times=1, counter=str(tmp_path / "n"))
    (tmp_path / "n").write_bytes(b".")
    running = await begin(model("a", knobs))
    await running.ask("a")
    await put_away(running, "a")
    (tmp_path / "n").write_bytes(b"")
    assert await running.ask("a") == "a 1 2 3 "
    assert running.state("a")["crashes"] == 1
    assert came_from(running, "a") == "nvme"


async def test_a_new_manager_finds_what_the_last_one_stored(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    await running.manager.close(1.0)
    running = await begin(model("a", SLOW))
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == "nvme"
    await put_away(running, "a")
    assert "writes" not in counters(running)


async def test_host_memory_that_is_short_sends_images_to_the_store(begin: Begin) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "nvme"
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0
    assert "host memory is short" in events(running, "image dropped", "a")[0]["reason"]
    assert await running.ask("a") == "a 1 2 3 "
    assert came_from(running, "a") == "nvme"
    await relax(running)
    await ready(running, "a")


async def test_a_full_store_and_one_that_fails_are_done_without(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW), swap=store(tmp_path / "swap", size_bytes=6 * MiB))
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "source"
    assert "full" in events(running, "image not stored", "a")[0]["reason"]
    service(running).store._fail("a write failed")
    assert await running.ask("a") == "a 1 2 3 "
    await put_away(running, "a")
    assert await running.ask("a") == "a 1 2 3 "
    assert running.manager.snapshot()["swap"]["read_only"] == "a write failed"


async def test_the_days_budget_bounds_what_is_stored(begin: Begin, tmp_path: Path) -> None:
    swap = store(tmp_path / "swap", daily_write_bytes=IMAGE + IMAGE // 2)
    running = await begin(model("a", SLOW), model("b", SLOW), swap=swap, dram_bytes=2 * ONE)
    for name in "ab":
        await running.ask(name)
        await put_away(running, name)
    assert [running.state(name)["shown_as"] for name in "ab"] == ["nvme", "source"]
    assert "budget" in events(running, "image not stored", "b")[0]["reason"]
    state = running.manager.snapshot()["swap"]
    assert state["written_today_bytes"] <= state["daily_write_bytes"]


async def test_closing_while_an_image_is_written(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await ready(running, "a")
    dropping = asyncio.create_task(running.manager._images.drop(running.manager._models["a"], "x", store_s=30.0))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await running.manager.close(0.0)
        await asyncio.gather(dropping, return_exceptions=True)
    assert running.manager.snapshot()["swap"]["state"] == "closed"


async def test_kv_blocks_make_room_for_what_is_worth_more(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    found = service(running).store
    for number in range(found.layout.slots):
        key = digest("block", str(number))
        found.put(Want(Kind.BLOCK, key, digest("kv"), 1, saved_s=1e-9, rate=1e-9), memoryview(b"x"))
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "nvme"
    assert found.status()["blocks"] < found.layout.slots
