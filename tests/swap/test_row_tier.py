"""Rows of an engine's memory go to a real store and come back, and whatever fails is not there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mball.errors import SwapMiss
from mball.swap import row_tier
from mball.swap.block_store import BlockStore
from mball.swap.book import Want
from mball.swap.disk import aligned
from mball.swap.kv_local import LocalBlocks
from mball.swap.place import Place, digest
from mball.swap.row_tier import Done, RowTier
from mball.swap.slots import Slots
from mball.swap.store import SwapStore, open_store
from mball.units import KiB, MiB
from tests.swap.stores import settings

ROW = 12 * KiB
ROWS = 32
MODEL = digest("a model")
DEADLINE_S = 30.0


class Bed:
    """A tier and its rows."""

    def __init__(self, store: BlockStore | None, *, queue_bytes: int = 4 * MiB, model: bytes = MODEL) -> None:
        self.memory = aligned(ROWS * ROW)
        self.tier = RowTier(self.row, model, row_bytes=ROW, queue_bytes=queue_bytes)
        self.tier.use_store(store)
        self.numbers = iter(range(10_000))
        self.late: list[Done] = []

    def row(self, number: int) -> memoryview:
        return self.memory[number * ROW : (number + 1) * ROW]

    def fill(self, keys: Sequence[bytes]) -> None:
        for number, key in enumerate(keys):
            self.row(number)[:] = content(key)

    def done(self) -> Done:
        """The one job under way."""
        waited = threading.Event()
        for _ in range(600):
            if done := self.tier.finished():
                [only] = done
                return only
            waited.wait(0.05)
        raise AssertionError("a job did not end")

    def keep(self, keys: Sequence[bytes]) -> Done:
        self.fill(keys)
        self.tier.store(next(self.numbers), keys, range(len(keys)))
        return self.done()

    def looked(self, keys: Sequence[bytes], user: str = "r", group: int = 0) -> list[bool]:
        """What each lookup comes to, as an engine asks that is told to ask again."""
        waited = threading.Event()
        for _ in range(600):
            found = [self.tier.lookup(key, user, group) for key in keys]
            self.tier.flush()
            if None not in found:
                return [answer is True for answer in found]
            waited.wait(0.01)
        raise AssertionError("a lookup was not answered")

    def back(self, keys: Sequence[bytes]) -> Done:
        """Into the rows from 8 on, which are each the key's bytes where it says so, and as they were elsewhere."""
        for row in range(8, ROWS):
            self.row(row)[:] = bytes(ROW)
        self.tier.load(next(self.numbers), keys, range(8, 8 + len(keys)))
        done = self.done()
        for number, key in enumerate(keys, 8):
            assert self.row(number) == (content(key) if key in done.good else bytes(ROW))
        return done


def content(key: bytes) -> bytes:
    return random.Random(key).randbytes(ROW)


def chain(name: str, count: int) -> list[bytes]:
    return [f"{name} {number}".encode() for number in range(count)]


BedFor = Callable[..., Bed]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SwapStore]:
    opened = open_store(settings(tmp_path / "store", size_bytes=1 * MiB, slot_bytes=8 * KiB))
    yield opened
    opened.close()


@pytest.fixture
def bed_for(store: SwapStore) -> Iterator[BedFor]:
    opened: list[Bed] = []

    def make(blocks: BlockStore | None = None, **options: object) -> Bed:
        opened.append(Bed(blocks or LocalBlocks(store, "w"), **options))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for bed in opened:
        assert bed.tier.close(DEADLINE_S)


def test_what_was_kept_comes_back_in_another_process_too(bed_for: BedFor, store: SwapStore) -> None:
    keys = chain("a", 8)
    first = bed_for()
    assert first.keep(keys) == Done(0, True, tuple(keys))
    other = bed_for()
    assert other.looked(keys) == [True] * 8
    assert other.back(keys).whole
    assert other.tier.counts()["loaded_blocks"] == 8
    # Kept once.
    assert other.keep(keys).whole
    assert store.status()["blocks"] == 8


def test_another_models_blocks_are_not_there(bed_for: BedFor) -> None:
    keys = chain("a", 4)
    bed_for().keep(keys)
    assert bed_for(model=digest("another")).looked(keys) == [False] * 4


def test_a_chain_is_there_from_either_end_up_to_what_is_missing(bed_for: BedFor) -> None:
    keys = chain("a", 8)
    bed = bed_for()
    bed.keep([*keys[:2], keys[4], *keys[6:]])
    assert bed.looked(keys) == [True, True, False, False, False, False, True, True]
    # What was answered stays so for whoever asks, until nobody does.
    assert bed.looked([keys[4]], user="s") == [False]
    bed.tier.forget("r")
    assert bed.looked([keys[4]], user="s") == [False]
    bed.tier.forget("s")
    assert bed.looked([keys[4]], user="s") == [True]


def test_groups_of_one_request_are_chains_of_their_own(bed_for: BedFor) -> None:
    """As of a model with sliding windows: those are asked for from the end."""
    whole, sliding = chain("a", 6), chain("b", 6)
    bed = bed_for()
    bed.keep(whole[:4] + sliding[:4])
    found = [bed.tier.lookup(key, "r", group) for group, keys in ((0, whole), (1, sliding[::-1])) for key in keys]
    assert set(found) == {None}
    assert bed.looked(whole) == [True] * 4 + [False] * 2
    assert bed.looked(sliding, group=1) == [True] * 4 + [False] * 2


def test_without_a_store_nothing_waits(bed_for: BedFor) -> None:
    bed = bed_for()
    bed.tier.use_store(None)
    assert bed.tier.lookup(b"a", "r") is False
    bed.tier.store(5, [b"a"], [0])
    assert bed.done() == Done(5, False, ())
    assert bed.tier.counts()["dropped_blocks"] == 1


@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_damaged_block_does_not_come_back_and_is_not_asked_for_again(
    bed_for: BedFor, store: SwapStore, which: int
) -> None:
    keys = chain("a", 8)
    bed = bed_for()
    bed.keep(keys)
    assert bed.looked(keys) == [True] * 8
    at = store.layout.slot_at(store.find(digest(keys[which]), MODEL).extents[0].first) + 4096
    page = aligned(4096)
    store.slots.disk.read([page], at)
    page[0] ^= 1
    store.slots.disk.write([page], at)
    done = bed.back(keys)
    assert not done.whole
    assert set(done.good) == set(keys) - {keys[which]}
    assert bed.looked(keys) == [number != which for number in range(8)]
    assert bed.tier.counts()["failed_loads"] == 1
    assert not store.has(digest(keys[which]), MODEL)


def test_more_than_the_queue_takes_is_dropped_at_once(bed_for: BedFor, store: SwapStore) -> None:
    gate = threading.Event()
    bed = bed_for(Waiting(LocalBlocks(store, "w"), gate), queue_bytes=4 * ROW)
    keys = chain("a", 4)
    bed.fill(keys)
    bed.tier.store(1, keys[:3], range(3))
    bed.tier.store(2, keys[2:], range(2, 4))
    assert bed.done() == Done(2, False, ())
    gate.set()
    assert bed.done().whole
    bed.tier.store(3, keys[3:], [3])
    assert bed.done().whole


def test_a_job_larger_than_the_queue_is_taken_where_nothing_waits(
    bed_for: BedFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_tier, "_LEAST_PIECE", 3)
    monkeypatch.setattr(row_tier, "_PIECE_BYTES", 1)
    bed = bed_for(queue_bytes=1)
    keys = chain("a", 8)
    assert bed.keep(keys).whole
    assert bed.looked(keys) == [True] * 8


def test_a_job_that_waited_too_long_is_not_done(bed_for: BedFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tier, "JOB_S", 0.0)
    bed = bed_for()
    keys = chain("a", 4)
    assert bed.keep(keys) == Done(0, False, ())
    assert bed.tier.counts()["dropped_blocks"] == 4
    assert bed.looked(keys) == [False] * 4


def test_what_continues_another_goes_before_it(bed_for: BedFor, store: SwapStore) -> None:
    """An engine says in any order what is to be kept; its lookups were in the order of the prompt."""
    keys = chain("a", 6)
    bed = bed_for()
    assert bed.looked(keys, user="r") == [False] * 6
    bed.fill(keys)
    mixed = [3, 0, 5, 2, 4, 1]
    bed.tier.store(1, [keys[number] for number in mixed], mixed, "r")
    assert bed.done() == Done(1, True, tuple(keys))
    parents = [store._book.entries[digest(key)].parent for key in keys]
    assert parents == [None, *(digest(key) for key in keys[:-1])]
    bed.tier.forget("r")
    assert bed.looked(keys) == [True] * 6
    assert bed.back(keys).whole


def test_a_store_that_does_not_answer_holds_nobody_up(
    bed_for: BedFor, store: SwapStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_tier, "LOOKUP_S", 0.05)
    gate = threading.Event()
    bed = bed_for(Waiting(LocalBlocks(store, "w"), gate))
    assert bed.looked([b"a"]) == [False]
    assert bed.tier.counts()["late_lookups"] == 1
    bed.tier.store(1, [b"a"], [0])
    assert not bed.tier.finished()
    bed.tier.drain(0.05)
    assert bed.done() == Done(1, False, ())
    gate.set()


def test_a_load_that_is_given_up_touches_no_row_afterwards(bed_for: BedFor, store: SwapStore) -> None:
    gate = threading.Event()
    keys = chain("a", 4)
    bed_for().keep(keys)
    bed = bed_for(Waiting(LocalBlocks(store, "w"), gate, reads=True))
    assert bed.looked(keys) == [True] * 4
    bed.tier.load(1, keys, range(8, 12))
    bed.tier.drain(0.05)
    assert bed.done() == Done(1, False, ())
    for row in range(8, 12):
        bed.row(row)[:] = content(b"another's")
    gate.set()
    assert bed.tier.close(DEADLINE_S)
    assert all(bed.row(row) == content(b"another's") for row in range(8, 12))


def test_a_disk_that_hangs_is_not_used_again(
    bed_for: BedFor, store: SwapStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_tier, "HANG_S", 0.05)
    gate = threading.Event()
    keys, others = chain("a", 4), chain("b", 1)
    bed_for().keep(keys)
    bed_for().keep(others)
    bed = bed_for(Waiting(LocalBlocks(store, "w"), gate, reads=True))
    assert bed.looked(keys) == [True] * 4
    assert not bed.back(keys).whole
    assert bed.tier.counts()["hangs"] == 1
    assert bed.looked(others, user="s") == [False]
    gate.set()


def test_a_full_store_refuses_and_what_is_more_is_computed(bed_for: BedFor, store: SwapStore) -> None:
    store._read_only = "for a test"
    bed = bed_for()
    assert bed.keep(chain("a", 4)) == Done(0, False, ())
    assert bed.tier.counts()["refused_blocks"] == 4


def test_a_job_that_comes_after_the_end_is_told_of_all_the_same(bed_for: BedFor) -> None:
    bed = bed_for()
    assert bed.tier.close(DEADLINE_S)
    bed.tier.load(1, [b"a"], [0])
    assert bed.done() == Done(1, False, ())


class Waiting:
    """A store whose calls, or whose reads alone, wait for a gate."""

    def __init__(self, inner: BlockStore, gate: threading.Event, *, reads: bool = False) -> None:
        self._inner = inner
        self._gate = gate
        self._reads = reads

    @property
    def slots(self) -> Slots:
        slots = self._inner.slots
        return _WaitingSlots(slots, self._gate) if self._reads else slots

    def _wait(self) -> None:
        if not self._reads:
            self._gate.wait(DEADLINE_S)

    def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
        self._wait()
        return self._inner.find(keys, model)

    def missed(self, place: Place, miss: SwapMiss) -> None:
        self._inner.missed(place, miss)

    def lease(self, wants: Sequence[Want]) -> list[Place | None]:
        self._wait()
        return self._inner.lease(wants)

    def commit(self, places: Sequence[Place]) -> int:
        return self._inner.commit(places)

    def abandon(self, places: Sequence[Place], error: OSError | None = None) -> None:
        self._inner.abandon(places, error)


class _WaitingSlots(Slots):
    def __init__(self, inner: Slots, gate: threading.Event) -> None:
        super().__init__(inner.disk, inner.layout, inner.store_id)
        self._gate = gate

    def read(self, place: Place, into: memoryview, offset: int = 0) -> int:
        self._gate.wait(DEADLINE_S)
        return super().read(place, into, offset)
