"""A swap store whose disk is full, fails, hangs, or is torn: images are missed or not stored, and serving goes on."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import random
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest

from mball.errors import Unavailable, WorkerDied
from mball.units import KiB, MiB
from tests.memory.conftest import Running, model
from tests.memory.test_swap_images import (
    ALWAYS,
    ONE,
    PLENTY,
    SLOT,
    SLOW,
    Begin,
    begin,
    came_from,
    counters,
    events,
    hosts,
    put_away,
    ready,
    relax,
    service,
    store,
)
from tests.small_disk import SMALL, freeze

__all__ = ["begin"]


def overwrite(path: Path, at: int, nbytes: int) -> None:
    """With other bytes, past nobody's cache."""
    with path.open("r+b") as file:
        file.seek(at)
        was = file.read(nbytes)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in was))
        file.flush()
        os.fsync(file.fileno())


async def serves(running: Running) -> None:
    assert await running.ask("a") == "a 1 2 3 "
    assert running.manager.snapshot()["books_wrong"] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_write_that_fails_is_the_last_and_serving_goes_on(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    tries = []

    def failing(parts: Sequence[memoryview], at: int) -> int:
        tries.append(at)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(service(running).store.slots.disk, "pwritev", failing)
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "source"
    assert os.strerror(number) in events(running, "image not stored", "a")[0]["reason"]
    assert os.strerror(number) in running.manager.snapshot()["swap"]["read_only"]
    assert counters(running)["write_errors"] == 1
    await serves(running)
    assert came_from(running, "a") == "source"
    before = len(tries)
    await put_away(running, "a")
    assert len(tries) == before
    await serves(running)


async def test_what_can_not_be_read_ahead_comes_from_the_files(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await begin(model("a", SLOW), policy=dataclasses.replace(ALWAYS, hold_s=0.0))
    await running.ask("a")
    await put_away(running, "a")

    def failing(parts: Sequence[memoryview], at: int) -> int:
        raise OSError(errno.EIO, "it is broken")

    monkeypatch.setattr(service(running).store.slots.disk, "preadv", failing)
    await relax(running)
    await serves(running)
    await ready(running, "a")
    assert counters(running)["misses:io"] == 1
    assert "io" in events(running, "image missed", "a")[0]["reason"]
    assert events(running, "image ready", "a")[-1]["filled_from"] == "source"
    await serves(running)


async def test_what_a_worker_can_not_read_comes_from_the_files(begin: Begin, tmp_path: Path) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await put_away(running, "a")
    os.truncate(tmp_path / "swap", 4 * SLOT)
    await serves(running)
    assert came_from(running, "a") == "source"
    assert counters(running)["misses:io"] == 1
    assert len(events(running, "image missed", "a")) == 1
    assert not running.state("a")["stored"]


@pytest.mark.parametrize(("areas", "found"), [([0], "nvme"), ([1], "nvme"), ([0, 1], "source")])
async def test_a_torn_index_is_read_from_its_other_copy_or_is_an_empty_store(
    begin: Begin, tmp_path: Path, areas: list[int], found: str
) -> None:
    running = await begin(model("a", SLOW), model("b", SLOW))
    for name in "ab":  # each has a snapshot: both copies know the first
        await running.ask(name)
        await put_away(running, name)
    layout = service(running).store.layout
    await running.manager.close(1.0)
    for area in areas:
        overwrite(tmp_path / "swap", layout.index_at(area), 4 * KiB)
    running = await begin(model("a", SLOW))
    await serves(running)
    assert came_from(running, "a") == found
    assert counters(running)["index_damaged"] >= 1
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "nvme"


async def test_a_store_that_hangs_keeps_no_memory_and_is_not_waited_for_again(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await begin(model("a", SLOW), policy=dataclasses.replace(ALWAYS, hurry_s=0.3))
    await running.ask("a")
    disk, go = service(running).store.slots.disk, threading.Event()
    pwritev, began = disk.pwritev, threading.Event()

    def late(parts: Sequence[memoryview], at: int) -> int:
        began.set()
        go.wait(60)
        return pwritev(parts, at)

    monkeypatch.setattr(disk, "pwritev", late)
    await put_away(running, "a")
    assert began.is_set()
    assert running.state("a")["shown_as"] == "source"
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0
    go.set()
    await serves(running)
    await put_away(running, "a")
    assert "it would take" in events(running, "image not stored", "a")[-1]["reason"]
    await serves(running)


async def test_who_is_in_a_hurry_does_not_wait_for_a_writing_that_another_has_time_for(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await ready(running, "a")
    found, images = running.manager._models["a"], running.manager._images
    go, began = threading.Event(), threading.Event()

    def late(parts: Sequence[memoryview], at: int) -> int:
        began.set()
        go.wait(120)
        raise OSError(errno.EIO, "late")

    monkeypatch.setattr(service(running).store.slots.disk, "pwritev", late)
    slowly = asyncio.create_task(images.drop(found, "another saves more", store_s=100.0))
    assert await asyncio.to_thread(began.wait, 30)
    async with asyncio.timeout(30):
        await images.drop(found, "host memory is short", store_s=0.1)
        await slowly
    assert not running.state("a")["image_ready"]
    assert running.manager.snapshot()["dram"]["image_bytes"] == 0
    assert [event["reason"] for event in events(running, "image dropped", "a")] == ["host memory is short"]
    go.set()
    await serves(running)


async def test_a_store_that_has_no_room_to_be_made_is_done_without(begin: Begin, small_disk: Path) -> None:
    running = await begin(model("a", SLOW), swap=store(small_disk / "swap", size_bytes=2 * SMALL), opened="unavailable")
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "source"
    assert list(small_disk.iterdir()) == []
    await serves(running)


async def test_a_disk_that_fills_up_later_takes_nothing_from_the_store(begin: Begin, small_disk: Path) -> None:
    running = await begin(model("a", SLOW), swap=store(small_disk / "swap"))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rubbish").write_bytes(bytes(SMALL))
    await running.ask("a")
    await put_away(running, "a")
    assert running.state("a")["shown_as"] == "nvme"
    await serves(running)
    assert came_from(running, "a") == "nvme"


async def test_a_read_only_disk_gives_what_it_has_and_takes_nothing(begin: Begin, small_disk: Path) -> None:
    running = await begin(model("a", SLOW), swap=store(small_disk / "swap"))
    await running.ask("a")
    await put_away(running, "a")
    await running.manager.close(1.0)
    freeze(small_disk)
    models = model("a", SLOW), model("b", SLOW)
    running = await begin(*models, swap=store(small_disk / "swap"), dram_bytes=24 * MiB)
    await serves(running)
    assert came_from(running, "a") == "nvme"
    await running.ask("b")
    await put_away(running, "b")
    assert running.state("b")["shown_as"] == "source"
    assert running.manager.snapshot()["swap"]["read_only"] is not None
    assert "writes" not in counters(running)


async def test_a_new_worker_gets_no_image_of_files_that_have_changed(begin: Begin) -> None:
    running = await begin(model("a", SLOW))
    await running.ask("a")
    await ready(running, "a")
    found = running.manager._models["a"]
    changed = dataclasses.replace(SLOW, content="other files")
    found.spec = dataclasses.replace(found.spec, environment=changed.environment())
    os.kill(running.state("a")["pid"], 9)
    await running.until(lambda: running.state("a")["process"] == "gone")
    assert running.state("a")["shown_as"] == "dram"
    await serves(running)
    assert came_from(running, "a") == "source"
    assert "changed" in events(running, "image dropped", "a")[0]["reason"]
    await ready(running, "a")
    assert found.image is not None
    assert found.image.key == found.image_key


async def test_shortage_kills_evictions_and_requests_at_once(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is answered, the books are right, and in the end all is as if nothing had been."""
    chance = random.Random(5)
    quick = dataclasses.replace(SLOW, promote_s=0.01)
    names = [f"m{number}" for number in range(5)]
    policy = dataclasses.replace(ALWAYS, hold_s=0.0, hurry_s=2.0, start_attempts=1000, backoff_s=0.01)
    running = await begin(*(model(name, quick) for name in names), policy=policy, dram_bytes=2 * ONE)
    found, disk = service(running).store, service(running).store.slots.disk
    preadv = disk.preadv

    def sometimes(parts: Sequence[memoryview], at: int) -> int:
        if chance.random() < 0.3:
            raise OSError(errno.EIO, "it is broken")
        return preadv(parts, at)

    monkeypatch.setattr(disk, "preadv", sometimes)
    answered, over = [0], asyncio.Event()

    async def client(number: int) -> None:
        choice = random.Random(number)
        while not over.is_set():
            name = choice.choice(names)
            try:
                assert await running.ask(name) == f"{name} 1 2 3 "
                answered[0] += 1
            except (WorkerDied, Unavailable, aiohttp.ClientError):
                await asyncio.sleep(0.05)  # its worker was killed

    clients = [asyncio.create_task(client(number)) for number in range(3)]
    for _ in range(60):
        await asyncio.sleep(0.1)
        hosts[running][0] = chance.choice([0, PLENTY, PLENTY])
        if chance.random() < 0.2:
            key = running.manager._models[chance.choice(names)].image_key
            if key is not None:
                found.drop(key)
        pid = running.state(chance.choice(names))["pid"]
        if pid is not None and chance.random() < 0.1:
            os.kill(pid, signal.SIGKILL)
        assert running.manager.snapshot()["books_wrong"] == []
    over.set()
    async with asyncio.timeout(120):
        await asyncio.gather(*clients)
    assert answered[0] > 20
    assert counters(running)["writes"] > 0
    monkeypatch.setattr(disk, "preadv", preadv)
    for name in names:
        assert await running.ask(name) == f"{name} 1 2 3 "
    await relax(running)
    state = running.manager.snapshot()
    assert state["books_wrong"] == []
    assert not [event for event in events(running, "failed") if "swap store holds" in event["reason"]]
