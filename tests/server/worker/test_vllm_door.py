"""An engine's way to its manager's swap store: from a process below the worker, through the worker, and back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mball.errors import TransitionError, VerbFailed
from mball.memory import control
from mball.memory.events import Events
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_keeper import SwapKeeper
from mball.server.worker.vllm_door import Door
from mball.server.worker.vllm_link import Link
from mball.swap.block_store import BlockStore
from mball.swap.disk import aligned
from mball.swap.service import SwapService
from tests.swap.stores import MODEL, block, content, settings

DEADLINE_S = 30.0


@dataclass
class Engine:
    """What a link's thread told."""

    told: list[BlockStore | None] = field(default_factory=list)

    def use_store(self, store: BlockStore | None) -> None:
        self.told.append(store)

    async def store(self) -> BlockStore:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if self.told and self.told[-1] is not None:
                    return self.told[-1]
                await asyncio.sleep(0.01)

    async def without(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if self.told and self.told[-1] is None:
                    return
                await asyncio.sleep(0.01)


@dataclass
class Bed:
    door: Door
    path: Path
    broker: SwapBroker
    service: SwapService
    give: Callable[[], Awaitable[None]]
    asked: list[Any]
    """What came to the manager."""


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    keeper = SwapKeeper(settings(tmp_path / "swap"), Events())
    assert await keeper.open()
    assert keeper.service is not None
    broker = SwapBroker(keeper, 30.0)
    ours, theirs = (control.Channel(sock) for sock in control.pair())
    asked: list[Any] = []
    answers = broker.answers("w")

    async def answer(message: control.Message) -> control.Message:
        asked.append(message.get("verb"))
        return await answers(message)

    caller = control.Caller(ours, lambda _: None, answer=answer)
    asker = control.Asker(theirs)
    serving = asyncio.create_task(control.serve(theirs, {}, asker))
    door = Door(tmp_path / "w.kv", asker)
    store = keeper.service.store

    async def give() -> None:
        await door.give(store.worker_fd(), store.slots.to_wire())

    yield Bed(door, tmp_path / "w.kv", broker, keeper.service, give, asked)
    await door.close()
    await caller.close()
    async with asyncio.timeout(DEADLINE_S):
        await serving
    theirs.close()
    await keeper.close()


@contextlib.asynccontextmanager
async def linked(bed: Bed, counts: dict[str, int] | None = None) -> AsyncIterator[Engine]:
    engine = Engine()
    link = Link(str(bed.path), engine.use_store, lambda: counts or {})
    try:
        yield engine
    finally:
        assert await asyncio.to_thread(link.close, DEADLINE_S)
        assert engine.told[-1] is None


@pytest.mark.parametrize("engine_first", [True, False])
async def test_an_engine_reads_and_writes_the_managers_store(bed: Bed, engine_first: bool) -> None:
    if not engine_first:
        await bed.give()
    async with linked(bed) as engine:
        if engine_first:
            await bed.give()
        store, want = await engine.store(), block("a")
        [place] = await asyncio.to_thread(store.lease, [want])
        assert place is not None
        store.slots.write(place, content("a", want.nbytes))
        assert await asyncio.to_thread(store.commit, [place]) == 1
        assert await asyncio.to_thread(store.find, [want.key], MODEL) == [place]
        memory = aligned(want.nbytes)
        store.slots.read(place, memory)
        assert memory == content("a", want.nbytes)
        [leased] = await asyncio.to_thread(store.lease, [block("b")])
        assert leased is not None
    assert bed.service.store.status()["leased_slots"] == leased.slots
    # They are the worker's: with it they go back.
    bed.broker.gone("w")
    assert bed.service.store.status()["leased_slots"] == 0


async def test_its_socket_is_this_users_alone(bed: Bed) -> None:
    assert bed.path.stat().st_mode & 0o777 == 0o600


async def test_counts_are_those_of_all_engines(bed: Bed) -> None:
    async with linked(bed, {"stored_blocks": 2}), linked(bed, {"stored_blocks": 3, "hangs": 1}):
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if await bed.door.counts() == {"stored_blocks": 5, "hangs": 1}:
                    break
                await asyncio.sleep(0.01)


async def test_a_store_is_given_once(bed: Bed) -> None:
    await bed.give()
    with pytest.raises(TransitionError, match="already"):
        await bed.give()


async def test_nothing_but_the_stores_verbs_is_handed_on(bed: Bed) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(bed.path))
    channel = control.Channel(sock)
    asker = control.Asker(channel)
    serving = asyncio.create_task(control.serve(channel, {}, asker))
    for verb in ("stop", "swap", "hello", "swap.other"):
        with pytest.raises(VerbFailed, match="unknown verb"):
            await asker.call(verb, deadline_s=DEADLINE_S)
    assert not bed.asked
    with pytest.raises(VerbFailed, match=r"swap\.find"):
        await asker.call("swap.find", deadline_s=DEADLINE_S, keys=["no key"], model="no model")
    serving.cancel()
    await asyncio.wait({serving})
    channel.close()


async def test_without_a_worker_there_is_no_store(bed: Bed) -> None:
    await bed.give()
    async with linked(bed) as engine:
        store = await engine.store()
        await bed.door.close()
        assert await asyncio.to_thread(store.find, [block("a").key], MODEL) == []
        await engine.without()
    assert not bed.path.exists()


def test_where_nobody_listens(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match=r"No such file|refused"):
        Link(str(tmp_path / "nobody"), lambda _: None, dict)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
