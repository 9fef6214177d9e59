"""Where blocks of KV go that leave the device, and come back from: the arena in host memory, below it a store.

A block that is evicted from the pool goes to the arena where bringing it back beats computing it; from there, at its
second use, to the store. Both are caches: what is not there, late or damaged is computed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mball.device.cuda import Mark, Runtime
from mball.swap.block_store import BlockStore
from mball.swap.kv_arena import Arena
from mball.swap.kv_copies import Copies, CudaCopies, HostCopies
from mball.swap.kv_disk import KVDisk, Loading, Room
from mball.swap.kv_gate import Gate
from mball.swap.kv_shelf import Held
from mball.swap.policy import Worth

LONGEST_WAIT_S = 30.0
"""For blocks from a store, before they are computed instead; and less where computing takes less."""
_SHORTEST_WAIT_S = 0.25
_WAIT_RATIO = 2.0
"""So many times as long as computing takes they are waited for."""
_BATCH = 64


class KVTier:
    """One model's. `attach` to `detach`, and what is called between them, belong to the thread that steps; the others
    are thread-safe. `clock`: seconds since 1970."""

    def __init__(
        self,
        model: bytes,
        *,
        block_tokens: int,
        block_bytes: int,
        arena_bytes: int,
        runtime: Runtime | None = None,
        notify: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`runtime`: of the GPU whose pool it is. `notify` is called by another thread when a loading is done.

        Raises OSError where there is no address space for the arena.
        """
        self.gate = Gate()
        self._room = Room(model, block_tokens, block_bytes, Arena(arena_bytes, block_bytes, runtime), self.gate, clock)
        self._disk = KVDisk(self._room, notify)
        self._copies: Copies | None = None
        self._steps: list[tuple[Any, Any, int, int]] = []
        self._closing = threading.Event()
        self._preparing: threading.Thread | None = None
        if runtime is not None:
            self._preparing = threading.Thread(target=self._prepare, name="kv-arena", daemon=True)
            self._preparing.start()

    @property
    def arena_bytes(self) -> int:
        return self._room.arena.nbytes

    def use_store(self, store: BlockStore | None, deadline_s: float = 10.0) -> bool:
        """Read and write there from now on, or nowhere; False where what was begun before does not end in time."""
        return self._disk.use(store, deadline_s)

    def counts(self) -> dict[str, int]:
        with self._room.lock:
            return {**self._room.counters.all(), **self.gate.counts, "arena_blocks": len(self._room.arena.shelf)}

    def attach(self, pool: Tensor) -> None:
        """The pool is there: (blocks, …), a block contiguous."""
        rows, arena = pool.view(pool.shape[0], -1).view(torch.uint8), self._room.arena
        if rows.device.type == "cpu":
            self._copies = HostCopies(rows, arena.rows)
        else:
            self._copies = CudaCopies(rows, arena.rows, arena.piece_slots)

    def detach(self) -> None:
        """The pool goes; every copy has ended. Idempotent."""
        copies, self._copies = self._copies, None
        self._steps.clear()
        if copies is not None:
            copies.drain()

    def worth(self, depth: int) -> Worth:
        """Of a block after so many others, that is used now."""
        with self._room.lock:
            return self._room.worth(depth)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Sequences use these blocks."""
        with self._room.lock:
            for key in keys:
                self._room.touches.touch(key)

    def spill(self, gone: Sequence[Held]) -> None:
        """These leave the pool: copy out what is worth it. Their places are blocks of the pool, and may be computed
        into after `order`."""
        copies, room = self._copies, self._room
        if copies is None:
            return
        pairs: list[tuple[int, int]] = []
        kept: list[Held] = []
        copied: list[Held] = []
        with room.lock:
            for held in sorted(gone, key=lambda held: held.depth):
                start = held.depth * room.block_tokens
                there = room.arena.shelf.get(held.key)
                if there is not None:
                    there.worth = held.worth
                    kept.append(there)
                elif not room.gate.better("dram", start, room.block_tokens, room.block_bytes, room.clock()):
                    room.counters.add("not_spilled_blocks")
                elif (slot := room.arena.take(held.worth.score(room.block_bytes))) is not None:
                    new = Held(held.key, slot, held.parent, held.depth, held.worth, room.block_bytes, pins=1)
                    room.arena.shelf.add(new)
                    pairs.append((held.place, slot))
                    copied.append(new)
        if pairs:
            self._stamp(pairs, copies.out(pairs))
            room.counters.add("spilled_blocks", len(pairs))
            # Until then its slot must be nobody else's: the copy would be another's bytes.
            with room.lock:
                for new in copied:
                    room.arena.shelf.unpin(new)
        self._disk.keep([*kept, *copied])

    def retire(self, blocks: Sequence[Held], deadline_s: float) -> None:
        """The pool is about to go: what is in it leaves, prefixes first, as far as there is time."""
        ends = time.monotonic() + deadline_s
        ordered = sorted(blocks, key=lambda held: held.depth)
        for first in range(0, len(ordered), _BATCH):
            if time.monotonic() >= ends:
                break
            self.spill(ordered[first : first + _BATCH])
        self.detach()

    def hold(self, keys: Sequence[bytes], depth: int) -> list[Held]:
        """The first of these that the arena has, to be `restore`d, where that beats computing them; else none."""
        room = self._room
        with room.lock:
            found = room.arena.shelf.chain(keys) if self._copies is not None else []
            start, tokens, nbytes = depth * room.block_tokens, room.block_tokens, room.block_bytes
            count = len(found)
            if not found or not room.gate.admits("dram", start, count * tokens, count * nbytes, room.clock()):
                return []
            for held in found:
                room.arena.shelf.pin(held)
        return found

    def restore(self, found: Sequence[Held], blocks: Sequence[int]) -> None:
        """What was held goes to these blocks of the pool: what is computed next finds it there."""
        copies, room = self._copies, self._room
        if copies is None:
            raise ValueError("there is no pool to restore blocks to")
        copies.order(blocks)
        pairs = [(block, held.place) for block, held in zip(blocks, found, strict=True)]
        self._stamp(pairs, copies.back(pairs))
        room.counters.add("restored_blocks", len(pairs))
        with room.lock:
            for held in found:
                room.arena.shelf.use(held, room.clock())
                room.arena.shelf.unpin(held)
        self._disk.keep(found)

    def begin(self, keys: Sequence[bytes], parent: bytes | None, depth: int) -> Loading | None:
        """Blocks of these that only a store may have begin to come into the arena; None where that is not worth it."""
        room = self._room
        if not self._disk.attached or not keys:
            return None
        with room.lock:
            found = room.arena.shelf.chain(keys)
            count = len(keys) - len(found)
            first = depth + len(found)
            start, tokens = first * room.block_tokens, count * room.block_tokens
            nbytes = count * room.block_bytes
            if not count or not room.gate.better("store", start, tokens, nbytes, room.clock(), whole=True):
                if count:
                    room.gate.counts["store:refused"] += 1
                return None
            for held in found:
                room.arena.shelf.pin(held)
            wait_s = self._wait_s(start, tokens)
        before = found[-1].key if found else parent
        loading = Loading(keys[len(found) :], before, first, time.monotonic() + wait_s, found)
        return loading if self._disk.load(loading) else None

    def late(self, loading: Loading) -> None:
        """Nobody waits for it any more."""
        loading.wanted = False
        self._room.counters.add("late_loads")

    def order(self, blocks: Iterable[int]) -> None:
        """What is computed next writes to these blocks."""
        if self._copies is not None:
            self._copies.order(blocks)

    def stamp(self) -> Any:
        return None if self._copies is None else self._copies.stamp()

    def computed(self, first: Any, start: int, count: int) -> None:
        """Since the stamp `count` tokens of one sequence were computed, from position `start` on."""
        if self._copies is not None and first is not None:
            self._steps.append((first, self._copies.stamp(), start, count))

    def measure(self) -> None:
        """Take in what became known since."""
        copies, room = self._copies, self._room
        if copies is None:
            return
        with room.lock:
            while self._steps and (seconds := copies.seconds(*self._steps[0][:2])) is not None:
                _, _, start, count = self._steps.pop(0)
                self.gate.computed(start, count, seconds)
            for nbytes, seconds in copies.loads():
                self.gate.loaded("dram", nbytes, seconds, room.clock())

    def close(self, deadline_s: float) -> bool:
        """Writes to the store what is to be there, as far as there is time; False where a thread hangs: then the
        arena's memory stays. Idempotent."""
        self._closing.set()
        self.detach()
        ends = time.monotonic() + deadline_s
        ended = self._disk.close(deadline_s)
        if self._preparing is not None:
            self._preparing.join(max(1.0, ends - time.monotonic()))
            ended = ended and not self._preparing.is_alive()
        if ended:
            self._room.arena.close()
        return ended

    def _wait_s(self, start: int, tokens: int) -> float:
        compute_s = self.gate.recompute_s(start, tokens)
        if compute_s is None or self.gate.forced:
            return LONGEST_WAIT_S
        return min(LONGEST_WAIT_S, max(_SHORTEST_WAIT_S, _WAIT_RATIO * compute_s))

    def _stamp(self, pairs: Sequence[tuple[int, int]], mark: Mark | None) -> None:
        with self._room.lock:
            self._room.arena.stamp((slot for _, slot in pairs), mark)

    def _prepare(self) -> None:
        arena = self._room.arena
        for first in range(0, arena.slots, arena.piece_slots):
            if self._closing.is_set():
                return
            try:
                ready = arena.prepare(first)
            except OSError:
                # There is less memory than was hoped for.
                return
            with self._room.lock:
                arena.open(ready)
