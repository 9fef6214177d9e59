"""A worker's calls for the swap store, over a real channel to a real store."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mball.errors import SwapMiss, SwapRefused, VerbFailed
from mball.memory import control
from mball.memory.events import Events
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_keeper import SwapKeeper
from mball.memory.swap_limits import MOST_KEYS, MOST_LEASES, MOST_SLOTS, MOST_WANTS
from mball.server.worker.swap_client import RemoteBlockStore
from mball.swap.block_store import BlockStore
from mball.swap.book import Want
from mball.swap.disk import aligned
from mball.swap.place import Place, digest
from mball.swap.service import SwapService
from mball.swap.slots import Slots
from mball.units import KiB, MiB
from tests.swap.stores import MODEL, SLOT, block, content, settings

T = TypeVar("T")

DEADLINE_S = 30.0


@dataclass
class Worker:
    """A worker's end, and the store behind the manager's."""

    client: RemoteBlockStore
    asker: control.Asker
    caller: control.Caller
    broker: SwapBroker
    service: SwapService

    async def do(self, call: Callable[[], T]) -> T:
        """In a thread, as a KV tier does."""
        return await asyncio.to_thread(call)

    @property
    def status(self) -> dict[str, Any]:
        return self.service.store.status()

    async def written(self, *wants: Want) -> list[Place]:
        places = await self.do(lambda: self.client.lease(wants))
        for want, place in zip(wants, places, strict=True):
            assert place is not None
            self.client.slots.write(place, content(want.key.hex(), want.nbytes))
        return [place for place in places if place is not None]


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    keeper = SwapKeeper(settings(tmp_path / "swap", size_bytes=128 * MiB), Events())
    assert await keeper.open()
    assert keeper.service is not None
    broker = SwapBroker(keeper, 30.0)
    ours, theirs = (control.Channel(sock) for sock in control.pair())
    caller = control.Caller(ours, lambda _: None, answer=broker.answers("w"))
    asker = control.Asker(theirs)
    serving = asyncio.create_task(control.serve(theirs, {}, asker))
    slots = Slots.from_wire(keeper.service.store.worker_fd(), keeper.service.store.slots.to_wire())
    client = RemoteBlockStore(slots, asker, asyncio.get_running_loop(), 30.0)
    yield Worker(client, asker, caller, broker, keeper.service)
    await caller.close()
    async with asyncio.timeout(30):
        await serving
    theirs.close()
    slots.disk.close()
    await keeper.close()


def blocks(count: int, name: str = "") -> list[Want]:
    return [block(f"{name}{n}") for n in range(count)]


async def test_blocks_are_leased_written_committed_found_and_read(worker: Worker) -> None:
    store: BlockStore = worker.client
    wants = [block("0"), block("1", parent="0"), block("2", parent="1", nbytes=SLOT * 2 + 5)]
    places = await worker.written(*wants)
    assert await worker.do(lambda: store.find([want.key for want in wants], MODEL)) == []
    assert await worker.do(lambda: store.commit(places)) == 3
    assert await worker.do(lambda: store.lease(wants)) == [None, None, None]
    assert await worker.do(lambda: store.find([want.key for want in wants], MODEL)) == places
    for want, place in zip(wants, places, strict=True):
        memory = aligned(want.nbytes)
        store.slots.read(place, memory)
        assert memory == content(want.key.hex(), want.nbytes)
    entries = worker.service.store._book.entries
    assert entries[wants[1].key].parent == wants[0].key
    assert await worker.do(lambda: store.find([wants[0].key, digest("?"), wants[1].key], MODEL)) == places[:1]
    assert await worker.do(lambda: store.find([wants[0].key], digest("another model"))) == []


async def test_batches_of_any_size_fit_the_channel(worker: Worker) -> None:
    count = max(MOST_KEYS, MOST_WANTS, MOST_LEASES) + 100
    wants = blocks(count)
    places = await worker.do(lambda: worker.client.lease(wants))
    assert len(places) == count
    assert await worker.do(lambda: worker.client.commit([p for p in places if p is not None])) == count
    assert await worker.do(lambda: worker.client.find([want.key for want in wants], MODEL)) == places
    wants = blocks(MOST_LEASES + 1, "more")
    places = await worker.do(lambda: worker.client.lease(wants))
    assert worker.status["leased_slots"] == len(places)
    await worker.do(lambda: worker.client.abandon([p for p in places if p is not None]))
    assert worker.status["leased_slots"] == 0


async def test_entries_of_many_extents_are_found_in_several_answers(worker: Worker) -> None:
    store, layout = worker.service.store, worker.service.store.layout
    each = MOST_SLOTS // 4
    holes = blocks(layout.slots - 8, "hole")
    leases = [store.lease("x", want) for want in holes]
    for lease in leases[::2]:
        assert lease is not None
        store.abandon("x", lease.id)
    wants = [block(f"wide {n}", nbytes=each * SLOT) for n in range(5)]
    places = await worker.do(lambda: worker.client.lease(wants))
    assert [len(place.extents) > each // 2 for place in places if place] == [True] * 5
    await worker.do(lambda: worker.client.commit([p for p in places if p is not None]))
    assert await worker.do(lambda: worker.client.find([want.key for want in wants], MODEL)) == places


async def test_a_damaged_block_is_told_and_dropped(worker: Worker) -> None:
    want = block("a")
    [place] = await worker.written(want)
    await worker.do(lambda: worker.client.commit([place]))
    worker.client.slots.write(place, content("other bytes", want.nbytes))
    worker.client.slots.disk.write([aligned(4 * KiB)], worker.client.slots.layout.slot_at(place.extents[0].first))
    with pytest.raises(SwapMiss) as miss:
        worker.client.slots.read(place, aligned(want.nbytes))
    await worker.do(lambda: worker.client.missed(place, miss.value))
    assert not worker.service.store.has(want.key, MODEL)
    assert worker.status["counters"]["misses:checksum"] == 1


async def test_a_write_that_failed_ends_the_writing_and_not_the_reading(worker: Worker) -> None:
    first, second = block("a"), block("b")
    [place] = await worker.written(first)
    await worker.do(lambda: worker.client.commit([place]))
    [leased] = await worker.do(lambda: worker.client.lease([second]))
    assert leased is not None
    await worker.do(lambda: worker.client.abandon([leased], OSError(errno.EIO, "no")))
    assert "a write failed" in worker.status["read_only"]
    with pytest.raises(SwapRefused) as refused:
        await worker.do(lambda: worker.client.lease([second]))
    assert refused.value.reason == "read_only"
    assert await worker.do(lambda: worker.client.find([first.key], MODEL)) == [place]


async def test_what_does_not_fit_is_refused_and_what_fits_is_leased(worker: Worker) -> None:
    slots = worker.service.store.layout.slots
    most = MOST_SLOTS * SLOT
    wants = [block(f"{n}", nbytes=most) for n in range(slots // MOST_SLOTS + 1)]
    places = await worker.do(lambda: worker.client.lease(wants))
    assert len(places) == slots // MOST_SLOTS
    with pytest.raises(SwapRefused, match="full"):
        await worker.do(lambda: worker.client.lease([block("x", nbytes=most)]))
    with pytest.raises(SwapRefused, match="at most"):
        await worker.do(lambda: worker.client.lease([block("x", nbytes=most + 1)]))


async def test_a_manager_that_is_gone_is_a_miss_and_a_refusal(worker: Worker) -> None:
    await worker.caller.close()
    want = block("a")
    assert await worker.do(lambda: worker.client.find([want.key], MODEL)) == []
    with pytest.raises(SwapRefused, match="closed"):
        await worker.do(lambda: worker.client.lease([want]))
    with pytest.raises(SwapRefused):
        await worker.do(lambda: worker.client.commit([Place(want.key, MODEL, 1, 1, ())]))
    await worker.do(lambda: worker.client.abandon([Place(want.key, MODEL, 1, 1, ())]))
    await worker.do(lambda: worker.client.missed(Place(want.key, MODEL, 1, 1, ()), SwapMiss("io", "")))


@pytest.mark.parametrize("asked_before", [False, True])
async def test_a_loop_that_ends_keeps_nobody_waiting(
    worker: Worker, asked_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop of another thread, stopped: what it is handed is not begun until it is run again."""
    ours, theirs = (control.Channel(sock) for sock in control.pair())

    def ends() -> list[Place]:
        with asyncio.Runner() as runner, ThreadPoolExecutor() as asking:
            loop, handed = runner.get_loop(), threading.Event()
            hand = loop.call_soon_threadsafe

            def handing(*arguments: Any, **options: Any) -> asyncio.Handle:
                handle = hand(*arguments, **options)
                handed.set()
                return handle

            monkeypatch.setattr(loop, "call_soon_threadsafe", handing)
            store = RemoteBlockStore(worker.client.slots, control.Asker(theirs), loop, DEADLINE_S * 2)
            found: Future[list[Place]] | None = None
            if asked_before:
                found = asking.submit(store.find, [block("a").key], MODEL)
                assert handed.wait(DEADLINE_S)
            loop.call_soon(store.close)
            loop.call_soon(loop.stop)
            loop.run_forever()
            if found is None:
                return asking.submit(store.find, [block("a").key], MODEL).result(DEADLINE_S)
            runner.close()
            return found.result(DEADLINE_S)

    assert await worker.do(ends) == []
    ours.close()
    theirs.close()


async def test_leases_that_come_too_late_go_back(worker: Worker) -> None:
    hurried = RemoteBlockStore(worker.client.slots, worker.asker, asyncio.get_running_loop(), 0.05)
    book = worker.service.store._book
    before = book.next_generation
    with worker.service.store._lock:
        asked = asyncio.create_task(worker.do(lambda: hurried.lease(blocks(5))))
        while not asked.done():  # noqa: ASYNC110 - the store stands still meanwhile
            await asyncio.sleep(0.01)
    with pytest.raises(SwapRefused):
        await asked
    async with asyncio.timeout(30):
        while book.next_generation < before + 5 or worker.status["leased_slots"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(await worker.do(lambda: worker.client.lease(blocks(5)))) == 5


async def test_leases_of_a_worker_that_is_gone_return(worker: Worker) -> None:
    await worker.do(lambda: worker.client.lease(blocks(5)))
    assert worker.status["leased_slots"] == 5
    worker.broker.gone("w")
    assert worker.status["leased_slots"] == 0
    with pytest.raises(SwapRefused, match="no swap store"):
        await worker.do(lambda: worker.client.lease(blocks(5)))


WANT = {"key": "0" * 64, "nbytes": 1, "saved_s": 1.0, "rate": 1.0}
LIES: list[dict[str, Any]] = [
    {"verb": "swap.dance"},
    {"verb": ["swap.find"]},
    {"verb": "swap.find"},
    {"verb": "swap.find", "model": "0" * 64, "keys": ["short"]},
    {"verb": "swap.find", "model": "0" * 64, "keys": ["0" * 64] * (MOST_KEYS + 1)},
    {"verb": "swap.lease", "model": "0" * 64, "wants": [WANT] * (MOST_WANTS + 1)},
    {"verb": "swap.lease", "model": "0" * 64, "wants": [{**WANT, "nbytes": -1}]},
    {"verb": "swap.lease", "model": "0" * 64, "wants": [{**WANT, "nbytes": 1 << 60}]},
    {"verb": "swap.lease", "model": "0" * 64, "wants": [{**WANT, "saved_s": "much"}]},
    {"verb": "swap.lease", "model": "0" * 64, "wants": [{**WANT, "rate": float("inf")}]},
    {"verb": "swap.lease", "model": "0" * 64, "wants": [{**WANT, "parent": 7}]},
    {"verb": "swap.commit", "leases": [1] * (MOST_LEASES + 1)},
    {"verb": "swap.commit", "leases": [[]]},
    {"verb": "swap.abandon", "leases": [], "errno": "EIO"},
    {"verb": "swap.missed", "key": "0" * 64, "generation": 1, "reason": "because"},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: json.dumps(lie)[:60])
async def test_whoever_says_what_was_not_agreed_is_refused(worker: Worker, lie: dict[str, Any]) -> None:
    before = worker.status
    verb = lie["verb"]
    with pytest.raises(VerbFailed):
        await worker.asker.call(verb, deadline_s=30.0, **{k: v for k, v in lie.items() if k != "verb"})
    assert worker.status == before


async def test_anothers_leases_are_neither_committed_nor_given_back(worker: Worker) -> None:
    lease = worker.service.store.lease("another", block("a"))
    assert lease is not None
    assert await worker.do(lambda: worker.client.commit([lease.place])) == 0
    await worker.do(lambda: worker.client.abandon([lease.place]))
    await worker.do(lambda: worker.client.abandon([lease.place], OSError(errno.EIO, "no")))
    assert worker.status["leased_slots"] == 1
    assert worker.status["read_only"] is None
    assert worker.service.store.commit("another", [lease.id]) == 1


async def test_more_calls_than_are_answered_at_once_are_refused(worker: Worker) -> None:
    with worker.service.store._lock:
        calls = [
            asyncio.create_task(worker.asker.call("swap.lease", deadline_s=30.0, model="0" * 64, wants=[WANT]))
            for _ in range(80)
        ]
        async with asyncio.timeout(30):
            while not any(call.done() for call in calls):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, VerbFailed)]
    assert len(refused) == 80 - 32
    assert "under way already" in str(refused[0])
