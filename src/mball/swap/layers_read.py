"""Threads that read layers from files into host memory, and leave nothing in the page cache that was not there."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from torch import Tensor

from mball.device.mapping import Mapping
from mball.errors import Cancelled
from mball.loader.checkpoint import Checkpoint
from mball.loader.lanes import HostLane
from mball.loader.plan import Extent
from mball.loader.source import ALIGN_BYTES, Source
from mball.loader.workers import GRACE_S, STALL_S
from mball.units import MiB

PART_BYTES = 4 * MiB
"""One read: enough for a disk, small enough that several threads share a layer."""

_CACHED_SHARE = 0.9
"""Bytes that are in the page cache to that part are read from there, where most of the files is."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where in memory that begins at a page a layer's parts come to be by direct reads, which take the whole blocks
    around them; and how much memory that takes."""

    places: tuple[int, ...]
    nbytes: int


def staged(parts: Sequence[Extent]) -> Stage:
    places, nbytes = [], 0
    for part in parts:
        head = part.start % ALIGN_BYTES
        places.append(nbytes + head)
        nbytes += -(-(head + part.nbytes) // ALIGN_BYTES) * ALIGN_BYTES
    return Stage(tuple(places), nbytes)


class Reading:
    """One layer on its way into memory."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._began: float | None = None
        self._then: Callable[[], None] | None = None
        self.parts: list[Future[None]] = []
        self.seconds: float | None = None

    def wait(self, timeout_s: float = STALL_S) -> None:
        """Until all is there. Raises the first failing part's error, Cancelled, TimeoutError."""
        ended, left = wait(self.parts, timeout_s, FIRST_EXCEPTION)
        for part in ended:
            part.result()
        if left:
            raise TimeoutError(f"a layer was not read within {timeout_s:.0f} s")

    def settle(self, timeout_s: float = GRACE_S) -> bool:
        """Whether no thread writes any more, failed or not, after so long at most."""
        return not wait(self.parts, timeout_s)[1]

    def then(self, act: Callable[[], None]) -> None:
        """Do it once all is there, in the thread that read the last part; not at all after a failure."""
        with self._lock:
            if self._left:
                self._then = act
                return
        act()

    def part_begins(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    def part_done(self) -> None:
        with self._lock:
            self._left -= 1
            act = self._then if self._left == 0 else None
            if self._left == 0 and self._began is not None:
                self.seconds = time.perf_counter() - self._began
        if act is not None:
            act()


class Readers:
    """Reads layers in the order in which they were asked for, from the image where there is one, else from the shards:
    past the page cache, unless most of them is there."""

    def __init__(self, checkpoint: Checkpoint, image_fd: int | None, threads: int) -> None:
        """Raises ReadError."""
        self._source = Source(checkpoint, image_fd)
        # Asked once: a read of cached pages lets the kernel read ahead, and what that brings would look as if it had
        # been there before, until all of a file is.
        self._warm = self._source.mostly_resident()
        self._cancel = threading.Event()
        self._own = threading.local()
        self._open: list[Reading] = []
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mball-layer")

    def read(self, parts: Sequence[Extent], target: Tensor) -> Reading:
        """Begin; `parts` have their offsets in `target`, one byte an element."""
        reading = Reading(len(parts))
        reading.parts = [self._pool.submit(self._part, part, target, reading) for part in parts]
        self._open = [*(other for other in self._open if not other.settle(0.0)), reading]
        return reading

    def stage(self, parts: Sequence[Extent], stage: Stage, memory: Mapping) -> Reading:
        """Begin, without a copy by the processor: each part goes to its place."""
        reading, view = Reading(len(parts)), memoryview(memory.buffer).cast("B")
        reading.parts = [
            self._pool.submit(self._staged, part, place, view, reading)
            for part, place in zip(parts, stage.places, strict=True)
        ]
        self._open = [*(other for other in self._open if not other.settle(0.0)), reading]
        return reading

    def cancel(self) -> None:
        """What is under way fails with Cancelled before its next part."""
        self._cancel.set()

    def close(self) -> bool:
        """Cancel and end the threads; False where one hangs in the kernel: then the files stay open, as it may read
        on."""
        self.cancel()
        idle = all(reading.settle() for reading in self._open)
        self._pool.shutdown(wait=idle)
        if idle:
            self._source.close()
        return idle

    def _begins(self, part: Extent, reading: Reading) -> bool:
        """Whether the part is in the page cache."""
        if self._cancel.is_set():
            raise Cancelled("the layers are wanted no more")
        reading.part_begins()
        return self._warm and (self._source.resident_share(part.shard, part.start, part.nbytes) or 0.0) >= _CACHED_SHARE

    def _staged(self, part: Extent, place: int, memory: memoryview, reading: Reading) -> None:
        cached, source = self._begins(part, reading), self._source
        blocks = memory[place - part.start % ALIGN_BYTES :]
        if cached or source.read_direct(blocks, part.shard, part.start, part.nbytes) is None:
            source.read_extent(memory[place : place + part.nbytes], part)
            if not cached:
                source.drop(part.shard, part.start, part.nbytes)
        reading.part_done()

    def _part(self, part: Extent, target: Tensor, reading: Reading) -> None:
        cached, source = self._begins(part, reading), self._source
        if cached or part.cast is not None or not self._past_the_cache(part, target):
            lane = HostLane(target)
            source.read_extent(lane.buffer(part), part)
            lane.commit(part)
            if not cached:
                source.drop(part.shard, part.start, part.nbytes)
        reading.part_done()

    def _past_the_cache(self, part: Extent, target: Tensor) -> bool:
        buffer = self._buffer()
        memory = memoryview(buffer.buffer).cast("B")
        head = self._source.read_direct(memory, part.shard, part.start, part.nbytes)
        if head is None:
            return False
        ctypes.memmove(target.data_ptr() + part.offset, buffer.address + head, part.nbytes)
        return True

    def _buffer(self) -> Mapping:
        """This thread's own, aligned as direct reads want it."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = _Owned(PART_BYTES + 2 * ALIGN_BYTES)
        buffer: Mapping = self._own.buffer
        return buffer


class _Owned(Mapping):
    """Goes with its thread."""

    def __del__(self) -> None:
        self.close()
