"""Pinned buffers on the way to a GPU, made by the threads that use them and kept for the next load."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

from mball.device.cuda import Mark, Runtime
from mball.device.mapping import Mapping
from mball.errors import RegistrationFailed
from mball.units import MiB

KEEP_BYTES = 512 * MiB
"""The most pinned memory that is kept between loads."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Buffer:
    """`mark` is behind the last copy out of it."""

    address: int
    memory: memoryview
    mark: Mark | None = None
    ready: bool = False
    registered: bool = False


class Ring:
    """`count` buffers of `buffer_bytes`, taken in turn by at most `count` threads at once.

    A buffer is registered before its first copy (`pin`). Where the driver refuses that, the buffers work
    as pageable memory does: slowly.
    """

    def __init__(self, runtime: Runtime, buffer_bytes: int, count: int) -> None:
        self.buffer_bytes = buffer_bytes
        self.count = count
        self._runtime = runtime
        self._mapping = Mapping(buffer_bytes * count)
        self._refused = False
        self._buffers = [self._buffer(number) for number in range(count)]
        self._idle = deque(self._buffers)

    @property
    def nbytes(self) -> int:
        return self.buffer_bytes * self.count

    def take(self) -> Buffer:
        """The buffer whose copy was begun first, once it has arrived."""
        buffer = self._idle.popleft()
        if buffer.mark is not None:
            buffer.mark.wait()
        return buffer

    def pin(self, buffer: Buffer) -> None:
        """To be called before copies out of a buffer. At its first time after it was read into: then the disk has
        work meanwhile."""
        if not buffer.ready:
            self._prepare(buffer)

    def give(self, buffer: Buffer) -> None:
        self._idle.append(buffer)

    def close(self) -> None:
        """Give the memory back; no copy may be under way. Idempotent."""
        for buffer in self._buffers:
            if buffer.registered:
                self._runtime.unregister(buffer.address)
        self._buffers = []
        self._idle.clear()
        self._mapping.close()

    def _buffer(self, number: int) -> Buffer:
        begin = number * self.buffer_bytes
        memory = memoryview(self._mapping.buffer).cast("B")[begin : begin + self.buffer_bytes]
        return Buffer(self._mapping.address + begin, memory)

    def _prepare(self, buffer: Buffer) -> None:
        self._mapping.populate(buffer.address - self._mapping.address, self.buffer_bytes)
        buffer.ready = True
        if self._refused:
            return
        try:
            self._runtime.register(buffer.address, self.buffer_bytes)
            buffer.registered = True
        except RegistrationFailed as error:
            self._refused = True
            warn_once(f"{error}; copies from pageable memory take about six times as long")


class RingPool:
    """The rings that no load uses now: one per runtime, `keep_bytes` together at most."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self.keep_bytes = keep_bytes
        self._idle: dict[str, Ring] = {}
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        with self._lock:
            return sum(ring.nbytes for ring in self._idle.values())

    def take(self, key: str, runtime: Runtime, buffer_bytes: int, count: int) -> Ring:
        """A ring for one load: the one kept under `key` where it is like what is wanted. Raises OSError."""
        with self._lock:
            kept = self._idle.pop(key, None)
        if kept is not None and (kept.buffer_bytes, kept.count) == (buffer_bytes, count):
            return kept
        if kept is not None:
            kept.close()
        return Ring(runtime, buffer_bytes, count)

    def give(self, key: str, ring: Ring) -> None:
        """Keep it, or let go of it: there is no copy under way."""
        with self._lock:
            others = sum(kept.nbytes for kept in self._idle.values())
            if key not in self._idle and others + ring.nbytes <= self.keep_bytes:
                self._idle[key] = ring
                return
        ring.close()

    def release(self) -> int:
        """Unpin what is kept; its bytes."""
        with self._lock:
            rings = list(self._idle.values())
            self._idle.clear()
        for ring in rings:
            ring.close()
        return sum(ring.nbytes for ring in rings)


RINGS = RingPool()
"""This process's."""

_warned: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning("%s", message)


def bounded(buffer_bytes: int, count: int, limit_bytes: int, at_least: int) -> tuple[int, int]:
    """A ring's buffer size and count within `limit_bytes`: fewer buffers first (`at_least`), then smaller ones.

    None is smaller than 1 MiB.
    """
    while buffer_bytes > MiB and buffer_bytes * at_least > limit_bytes:
        buffer_bytes //= 2
    return buffer_bytes, max(at_least, min(count, limit_bytes // buffer_bytes))
