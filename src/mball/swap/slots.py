"""Slots written and read with their headers: all that a worker needs besides a descriptor and a lease."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import Any

from mball.errors import SwapMiss
from mball.swap.disk import Disk, aligned, is_aligned
from mball.swap.layout import BLOCK_BYTES, Layout, whole_blocks
from mball.swap.place import HEADER_BYTES, Place, Run, difference, header
from mball.units import MiB

CALL_BYTES = 16 * MiB
"""Payload of one system call, about."""
_MOST_SLOTS = 256
_MEMORYS_ERRORS = (errno.EFAULT, errno.ENOMEM, errno.EAGAIN)


class Slots:
    """An open store's slots. Thread-safe; a thread keeps scratch memory of up to CALL_BYTES."""

    def __init__(self, disk: Disk, layout: Layout, store_id: bytes) -> None:
        self.disk = disk
        self.layout = layout
        self.store_id = store_id
        self.slots_a_call = max(1, min(_MOST_SLOTS, CALL_BYTES // layout.slot_bytes))
        self._scratch = threading.local()

    @classmethod
    def from_wire(cls, fd: int, said: dict[str, Any]) -> Slots:
        """In a worker, of a descriptor and what `to_wire` said beside it. The descriptor stays the caller's."""
        layout = Layout(int(said["slot_bytes"]), int(said["slots"]))
        return cls(Disk(fd, direct=bool(said["direct"])), layout, bytes.fromhex(said["store_id"]))

    def to_wire(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "slot_bytes": self.layout.slot_bytes,
            "slots": self.layout.slots,
            "direct": self.disk.direct,
            "store_id": self.store_id.hex(),
        }

    def runs(self, place: Place, offset: int = 0, nbytes: int | None = None) -> Iterator[Run]:
        """System calls that cover the entry's bytes [offset, offset + nbytes)."""
        end = place.nbytes if nbytes is None else offset + nbytes
        first, last = offset // self.layout.slot_bytes, -(-end // self.layout.slot_bytes)
        return place.runs(first, last - first, self.slots_a_call)

    def write(self, place: Place, content: memoryview) -> int:
        """A leased entry's payload, all of it; the bytes written. Not synced. Raises OSError."""
        return sum(self.write_run(place, run, content) for run in self.runs(place))

    def write_run(self, place: Place, run: Run, content: memoryview) -> int:
        """One system call of `runs`; `content` is the whole entry's. Raises OSError."""
        slot_bytes = self.layout.slot_bytes
        content = content[run.ordinal * slot_bytes : min(place.nbytes, (run.ordinal + run.slots) * slot_bytes)]
        straight = not self.disk.direct or is_aligned(content)
        headers = self._memory("headers to write", run.slots * BLOCK_BYTES)
        parts: list[memoryview] = []
        for number in range(run.slots):
            payload = content[number * slot_bytes : (number + 1) * slot_bytes]
            block = headers[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            block[:HEADER_BYTES] = header(place, run.ordinal + number, payload, self.store_id)
            if not straight or len(payload) % BLOCK_BYTES:
                payload = self._padded(payload, number)
            parts += [block, payload]
        return self.disk.write(parts, self.layout.slot_at(run.slot))

    def read(self, place: Place, into: memoryview, offset: int = 0) -> int:
        """The entry's bytes from `offset` on, as many as `into` holds; the bytes read from the disk.

        Raises SwapMiss where they can't be had or can't be trusted; then what is in `into` is worth nothing. Fastest
        where `into` begins at a page, and `offset` and its length are whole slots.
        """
        if offset < 0 or offset + len(into) > place.nbytes:
            raise ValueError(f"bytes {offset} to {offset + len(into)} of an entry of {place.nbytes}")
        runs = self.runs(place, offset, len(into))
        return sum(self.read_run(place, run, into, offset) for run in runs)

    def read_bare(self, place: Place, first: int, into: memoryview) -> None:
        """Whole slots as they lie on the disk, headers and all, in as few and as large reads as there can be: the
        entry's part `first` and those after it, one in each `stride_bytes` of `into`, which begins at a page.

        Whose they are is known then; whether their payloads are right, the caller finds out. Raises SwapMiss.
        """
        stride = self.layout.stride_bytes
        for run in place.runs(first, len(into) // stride, self.slots_a_call):
            begin = (run.ordinal - first) * stride
            self._fetch([into[begin : begin + run.slots * stride]], run)
            for number in range(run.slots):
                at, ordinal = begin + number * stride, run.ordinal + number
                payload = into[at + BLOCK_BYTES :][: place.payload_bytes(ordinal, self.layout)]
                found = bytes(into[at : at + HEADER_BYTES])
                wrong = difference(found, place, ordinal, payload, self.store_id, proven=False)
                self._expect(wrong, run.slot + number)

    def read_run(self, place: Place, run: Run, into: memoryview, offset: int = 0) -> int:
        """One system call of `runs(place, offset, len(into))`. Raises SwapMiss, OSError where `into` has no memory."""
        slot_bytes = self.layout.slot_bytes
        headers = self._memory("headers read", run.slots * BLOCK_BYTES)
        parts: list[memoryview] = []
        payloads: list[memoryview] = []
        copies: list[tuple[memoryview, memoryview]] = []
        for number in range(run.slots):
            begin = (run.ordinal + number) * slot_bytes
            there = place.payload_bytes(run.ordinal + number, self.layout)
            low, high = max(begin, offset), min(begin + there, offset + len(into))
            target = into[low - offset : high - offset]
            if high - low == there and there % BLOCK_BYTES == 0 and (not self.disk.direct or is_aligned(target)):
                payloads.append(target)
                parts += [headers[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES], target]
            else:
                scratch = self._memory("payload", run.slots * slot_bytes)[number * slot_bytes :]
                payloads.append(scratch[:there])
                copies.append((target, scratch[low - begin : high - begin]))
                parts += [headers[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES], scratch[: whole_blocks(there)]]
        self._fetch(parts, run)
        for number, payload in enumerate(payloads):
            found = bytes(headers[number * BLOCK_BYTES : number * BLOCK_BYTES + HEADER_BYTES])
            self._expect(difference(found, place, run.ordinal + number, payload, self.store_id), run.slot + number)
        for target, source in copies:
            target[:] = source
        return sum(map(len, parts))

    def _fetch(self, parts: list[memoryview], run: Run) -> None:
        try:
            self.disk.read(parts, self.layout.slot_at(run.slot))
        except OSError as error:
            if error.errno in _MEMORYS_ERRORS:
                raise
            why = os.strerror(error.errno or errno.EIO)
            raise SwapMiss("io", f"slots {run.slot} to {run.slot + run.slots - 1} can't be read: {why}") from error

    def _expect(self, wrong: str | None, slot: int) -> None:
        if wrong is not None:
            raise SwapMiss(wrong, f"slot {slot} does not hold what was written there")

    def _padded(self, payload: memoryview, number: int) -> memoryview:
        """A copy that begins at a page and ends with a block, with zeros behind."""
        whole = whole_blocks(len(payload))
        scratch = self._memory("payload", (number + 1) * self.layout.slot_bytes)[number * self.layout.slot_bytes :]
        scratch[: len(payload)] = payload
        scratch[len(payload) : whole] = bytes(whole - len(payload))
        return scratch[:whole]

    def _memory(self, name: str, nbytes: int) -> memoryview:
        """This thread's own, as it was left."""
        kept: memoryview | None = getattr(self._scratch, name, None)
        if kept is None or len(kept) < nbytes:
            # All that one call may want: growing later would take away what earlier parts of the call are in.
            unit = self.layout.slot_bytes if name == "payload" else BLOCK_BYTES
            kept = aligned(self.slots_a_call * unit)
            setattr(self._scratch, name, kept)
        return kept


def of_the_disk(error: OSError) -> bool:
    """Whether a write failed for a reason of the disk's, not of the memory that was to be written."""
    return error.errno not in _MEMORYS_ERRORS
