"""Host memory for blocks of KV that left the device; a GPU copies from and to it by itself (pinned)."""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

from mball.device.cuda import Mark, Runtime
from mball.device.mapping import Mapping
from mball.errors import RegistrationFailed
from mball.loader.ring import warn_once
from mball.swap.kv_shelf import Held, Shelf
from mball.units import MiB

_PIECE_BYTES = 64 * MiB


class Arena:
    """Slots of one block each, and which block is in which. Not thread-safe but for `prepare`; its owner has a lock.

    A slot's bytes are used by the processor only once the slot's mark is past (`wait`).
    """

    def __init__(self, nbytes: int, block_bytes: int, runtime: Runtime | None) -> None:
        """With a runtime its memory is there after `prepare`. Raises OSError."""
        self.block_bytes = block_bytes
        self.shelf = Shelf()
        self._stride = -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.slots = nbytes // self._stride
        self.piece_slots = max(1, _PIECE_BYTES // self._stride)
        self._runtime = runtime
        self._registered: list[int] = []
        self._mapping = Mapping(max(1, self.slots) * self._stride)
        self._memory = memoryview(self._mapping.buffer).cast("B")
        self._marks: dict[int, Mark] = {}
        self._free: list[int] = list(range(self.slots)) if runtime is None else []

    @property
    def nbytes(self) -> int:
        return self.slots * self._stride

    @property
    def rows(self) -> Tensor:
        """(slots, block_bytes), bytes."""
        whole = torch.frombuffer(self._mapping.buffer, dtype=torch.uint8)
        return whole.view(-1, self._stride)[:, : self.block_bytes]

    def view(self, slot: int) -> memoryview:
        """A slot's bytes; they begin at a page."""
        return self._memory[slot * self._stride : slot * self._stride + self.block_bytes]

    def prepare(self, first: int) -> range:
        """Has memory that a GPU reads behind the piece that begins with slot `first`; its slots, for `open`. Raises
        OSError. Called by any thread."""
        last = min(self.slots, first + self.piece_slots)
        begin, nbytes = first * self._stride, (last - first) * self._stride
        self._mapping.populate(begin, nbytes)
        if self._runtime is not None:
            try:
                self._runtime.register(self._mapping.address + begin, nbytes)
                self._registered.append(self._mapping.address + begin)
            except RegistrationFailed as error:
                warn_once(f"{error}; KV copies from pageable memory take about six times as long")
        return range(first, last)

    def open(self, slots: Iterable[int]) -> None:
        """These can be used."""
        for slot in slots:
            heapq.heappush(self._free, slot)

    def take(self, below: float) -> int | None:
        """A slot for something worth that much: a free one, or that of something worth less. None: there is none."""
        if self._free:
            return heapq.heappop(self._free)
        gone = self.shelf.pop(below)
        return None if gone is None else gone.place

    def give(self, slot: int) -> None:
        """A slot that was taken holds nothing."""
        heapq.heappush(self._free, slot)

    def drop(self, held: Held) -> None:
        self.shelf.remove(held)
        self.give(held.place)

    def stamp(self, slots: Iterable[int], mark: Mark | None) -> None:
        """Copies from or to these slots end at the mark; None: they have ended."""
        for slot in slots:
            if mark is None:
                self._marks.pop(slot, None)
            else:
                self._marks[slot] = mark

    def mark(self, slot: int) -> Mark | None:
        """What to wait for before the processor uses the slot, outside of the owner's lock."""
        return self._marks.get(slot)

    def close(self) -> None:
        """No copy is under way. Idempotent."""
        registered, self._registered = self._registered, []
        for address in registered:
            if self._runtime is not None:
                self._runtime.unregister(address)
        self.shelf.clear()
        self._memory = memoryview(b"")
        self._mapping.close()
