"""A KV tier's way to a store: blocks are written there from the arena, and read back into it, by threads of its own."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from mball.errors import Cancelled, MballError, SwapRefused
from mball.swap.block_store import BlockStore
from mball.swap.book import Want
from mball.swap.counters import Counters
from mball.swap.index import Kind
from mball.swap.kv_arena import Arena
from mball.swap.kv_gate import Gate, Touches
from mball.swap.kv_io import read_blocks, write_blocks
from mball.swap.kv_lane import Lane
from mball.swap.kv_shelf import Held
from mball.swap.place import Place
from mball.swap.policy import Worth
from mball.swap.threads import Threads
from mball.units import MiB

_THREADS = 8
"""Enough for a disk's queue, and for the processor's copies out of the page cache."""
_PIECE_BYTES = 32 * MiB
_LEAST_PIECE = 8
"""Blocks read together: after each piece the gate is asked again, so a disk that is too slow costs one."""
_HANG_S = 30.0
"""A read or write of one piece that takes so long will not end: the store is used no more."""
_BATCH = 16
"""Blocks leased, written and committed together."""

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Room:
    """What a tier's parts share. `model` is its SHA-256; a block holds `block_tokens`. `lock` guards arena, gate and
    touches, and is never held over I/O."""

    model: bytes
    block_tokens: int
    block_bytes: int
    arena: Arena
    gate: Gate
    clock: Callable[[], float]
    touches: Touches = field(default_factory=Touches)
    counters: Counters = field(default_factory=Counters)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def worth(self, depth: int) -> Worth:
        """Of a block after so many others, that is used now."""
        seconds = self.gate.recompute_s(depth * self.block_tokens, self.block_tokens)
        return Worth(1.0 if seconds is None else seconds, 1.0, self.clock())


@dataclass(eq=False)
class Loading:
    """Blocks that follow each other on their way into the arena, `depth` others before them. `wanted`: somebody waits
    for them, till `deadline` (monotonic) at most. Once `done` those that arrived are in the arena; `held` are pinned
    there until then."""

    keys: Sequence[bytes]
    parent: bytes | None
    depth: int
    deadline: float
    held: list[Held] = field(default_factory=list)
    wanted: bool = True
    done: bool = False


class KVDisk:
    def __init__(self, room: Room, notify: Callable[[], None]) -> None:
        """`notify` is called when a loading is done, by a thread of this."""
        self._room = room
        self._notify = notify
        self._store: BlockStore | None = None
        self._threads: Threads | None = None
        self._reads: Lane | None = None
        self._writes: Lane | None = None
        self._stored = Touches()

    @property
    def attached(self) -> bool:
        return self._store is not None

    def use(self, store: BlockStore | None, deadline_s: float) -> bool:
        """Read and write there from now on. False where what was begun with the one before does not end in time."""
        self._store = None
        lanes = [lane for lane in (self._reads, self._writes) if lane is not None]
        ended = all(lane.idle(deadline_s) for lane in lanes)
        with self._room.lock:
            self._room.gate.forget("store")
            self._stored.clear()
        if store is not None and self._reads is None:
            self._threads = Threads(_THREADS)
            self._reads, self._writes = Lane("kv-read"), Lane("kv-write")
        self._store = store
        return ended

    def load(self, loading: Loading) -> bool:
        """Begin; False where there is no store."""
        store, lane = self._store, self._reads
        if store is None or lane is None or not lane.put(functools.partial(self._load, store, loading)):
            self._end(loading)
            return False
        return True

    def keep(self, blocks: Sequence[Held]) -> None:
        """Write those of the arena's blocks that are worth it and not there yet, soon."""
        store, lane, room = self._store, self._writes, self._room
        if store is None or lane is None:
            return
        wanted = []
        with room.lock:
            for held in blocks:
                start, now_s = held.depth * room.block_tokens, room.clock()
                again = room.touches.count(held.key) >= 2
                # It may have gone since.
                if not again or self._stored.count(held.key) or room.arena.shelf.get(held.key) is not held:
                    continue
                if room.gate.better("store", start, room.block_tokens, room.block_bytes, now_s):
                    room.arena.shelf.pin(held)
                    self._stored.touch(held.key)
                    wanted.append(held)
        for first in range(0, len(wanted), _BATCH):
            lane.put(functools.partial(self._write, store, wanted[first : first + _BATCH]))

    def close(self, deadline_s: float) -> bool:
        """Writes what is to be written, as far as there is time; False where a thread hangs. Idempotent."""
        self._store = None
        ends = time.monotonic() + deadline_s
        parts = [part for part in (self._writes, self._reads, self._threads) if part is not None]
        ended = [part.close(max(0.1, ends - time.monotonic())) for part in parts]
        return all(ended)

    def _load(self, store: BlockStore, loading: Loading) -> None:
        try:
            if loading.wanted:
                self._read(store, loading)
        except (MballError, OSError) as error:
            self._failed(error)
        finally:
            self._end(loading)
            self._notify()

    def _end(self, loading: Loading) -> None:
        with self._room.lock:
            for held in loading.held:
                self._room.arena.shelf.unpin(held)
        loading.done = True

    def _read(self, store: BlockStore, loading: Loading) -> None:
        room = self._room
        places = store.find(loading.keys, room.model)
        at, piece = 0, max(_LEAST_PIECE, _PIECE_BYTES // room.block_bytes)
        while at < len(places) and loading.wanted and self._goes_on(loading.depth + at, len(places) - at):
            wanted = places[at : at + piece]
            # Whatever it is worth, somebody waits for it.
            slots = self._take(len(wanted), math.inf)
            arrived = self._read_piece(store, wanted[: len(slots)], slots, loading, at)
            at += arrived
            if arrived < len(wanted):
                return

    def _goes_on(self, depth: int, count: int) -> bool:
        room = self._room
        with room.lock:
            return room.gate.admits(
                "store", depth * room.block_tokens, count * room.block_tokens, count * room.block_bytes, room.clock()
            )

    def _take(self, count: int, below: float) -> list[int]:
        slots: list[int] = []
        with self._room.lock:
            while len(slots) < count and (slot := self._room.arena.take(below)) is not None:
                slots.append(slot)
        return slots

    def _read_piece(
        self, store: BlockStore, places: Sequence[Place], slots: Sequence[int], loading: Loading, at: int
    ) -> int:
        """How many of the first arrived, and are the arena's now; `at` others of the loading before them."""
        room = self._room
        good = self._read_into(store, places, slots)
        with room.lock:
            for number, (place, slot) in enumerate(zip(places, slots, strict=True), at):
                held = room.arena.shelf.get(place.key)
                if number >= at + good or held is not None:
                    room.arena.give(slot)
                if number >= at + good:
                    continue
                if held is None:
                    parent = loading.keys[number - 1] if number else loading.parent
                    worth = room.worth(loading.depth + number)
                    held = Held(place.key, slot, parent, loading.depth + number, worth, room.block_bytes)
                    room.arena.shelf.add(held)
                room.arena.shelf.pin(held)
                loading.held.append(held)
                self._stored.touch(place.key)
        room.counters.add("loaded_blocks", good)
        return good

    def _read_into(self, store: BlockStore, places: Sequence[Place], slots: Sequence[int]) -> int:
        """How many of the first were read; the time that it took is the store's rate. Raises TimeoutError (an OSError):
        then the slots are lost."""
        room = self._room

        def read(number: int) -> int:
            self._wait(slots[number])
            return store.slots.read(places[number], room.arena.view(slots[number]))

        began = time.perf_counter()
        misses = read_blocks(store, places, room.block_bytes, read, self._run)
        seconds = time.perf_counter() - began
        room.counters.add("failed_loads", len(misses))
        good = min(misses, default=len(places))
        if good == len(places) > 0:
            with room.lock:
                room.gate.loaded("store", good * room.block_bytes, seconds, room.clock())
        return good

    def _write(self, store: BlockStore, blocks: Sequence[Held]) -> None:
        room = self._room
        try:
            written = self._write_batch(store, blocks)
            with room.lock:
                known = room.gate.knows("store", room.clock())
            if written and not known:
                self._try(store, written)
        except SwapRefused:
            room.counters.add("refused_blocks", len(blocks))
            with room.lock:
                for held in blocks:
                    self._stored.forget(held.key)
        except (MballError, OSError) as error:
            self._failed(error)
        finally:
            with room.lock:
                for held in blocks:
                    room.arena.shelf.unpin(held)

    def _write_batch(self, store: BlockStore, blocks: Sequence[Held]) -> list[Place]:
        room = self._room

        def content(number: int) -> memoryview:
            self._wait(blocks[number].place)
            return room.arena.view(blocks[number].place)

        written = write_blocks(store, [self._want(held) for held in blocks], content, self._run)
        room.counters.add("stored_blocks", written.entries)
        room.counters.add("refused_blocks", written.refused)
        with room.lock:
            for number in written.lost:
                self._stored.forget(blocks[number].key)
        return written.places

    def _try(self, store: BlockStore, places: Sequence[Place]) -> None:
        """Read what was just written once, so that the first who needs a block back finds the rate known."""
        slots = self._take(len(places), -math.inf)
        self._read_into(store, places[: len(slots)], slots)
        with self._room.lock:
            for slot in slots:
                self._room.arena.give(slot)

    def _want(self, held: Held) -> Want:
        room = self._room
        rate = held.worth.rate(room.clock())
        return Want(Kind.BLOCK, held.key, room.model, room.block_bytes, held.worth.saved_s, rate, held.parent)

    def _wait(self, slot: int) -> None:
        if (mark := self._room.arena.mark(slot)) is not None:
            mark.wait()

    def _run(self, calls: Sequence[Callable[[], int]], *, reading: bool) -> None:
        if self._threads is None:
            raise Cancelled("there is no store")
        self._threads.run(calls, reading=reading, deadline_s=_HANG_S)

    def _failed(self, error: Exception) -> None:
        """A load is a miss, a write is not done; what hangs is not used again."""
        self._room.counters.add("failed_loads")
        if isinstance(error, TimeoutError):
            self._store = None
        if not isinstance(error, Cancelled):
            _log.warning("KV blocks: the store failed", model=self._room.model.hex()[:16], error=str(error))
