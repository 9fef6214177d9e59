"""The swap store as its manager has it: weight images and KV blocks on a disk, checked on every read.

All methods block and are thread-safe, but those that say that they only look; `service.SwapService` is for an event
loop. What can't be read is a miss (SwapMiss), what can't be written is refused (SwapRefused): nothing else is raised
for a disk's faults, and after one of its writes failed the store is read-only.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from mball.device.mapping import Mapping
from mball.errors import Cancelled, ConfigError, SwapMiss, SwapRefused
from mball.swap import opening
from mball.swap.book import Book, Lease, Want
from mball.swap.budget import Budget
from mball.swap.counters import Counters
from mball.swap.disk import reopened
from mball.swap.index import Kind
from mball.swap.layout import SLOT_BYTES
from mball.swap.opening import Opened
from mball.swap.place import Place, Run
from mball.swap.policy import Worth
from mball.swap.slots import Slots, of_the_disk
from mball.swap.snapshots import Snapshots
from mball.swap.threads import Threads

MANAGER = "manager"
"""The owner of the manager's own leases."""

_ROUNDS = 4
"""Attempts to have room: others may take what was freed."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """`path`: a file or a block device; of an ephemeral store, the folder it lies in without a name. `size_bytes` None:
    a store that is there, whatever its size. `deadline_s`: how long the disk may take for one whole transfer."""

    path: Path
    size_bytes: int | None = None
    slot_bytes: int = SLOT_BYTES
    daily_write_bytes: int | None = None
    ephemeral: bool = False
    threads: int = 8
    deadline_s: float = 600.0


class SwapStore:
    def __init__(
        self,
        opened: Opened,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Use `open_store`."""
        superblock = opened.superblock
        self.settings = settings
        self.layout = superblock.layout
        self.slots = Slots(opened.disk, superblock.layout, superblock.store_id)
        self.counters = Counters()
        self._opened = opened
        self._clock = clock
        self._snapshots = Snapshots(opened.disk, superblock)
        self._lock = threading.Lock()
        """Of the book; never held over I/O."""
        self._flushing = threading.Lock()
        self._read_only: str | None = None if opened.disk.writable else "the file can't be written to"
        self._closed = False
        # Above every generation that a store without its newest index may have given before.
        self._book = Book(self.layout, Budget(settings.daily_write_bytes), time.time_ns())
        self._resume()
        self._threads = Threads(settings.threads)

    @property
    def read_only(self) -> str | None:
        """Why nothing is written any more; None where it is. Only looks."""
        return self._read_only

    def worker_fd(self) -> int:
        """A descriptor to pass to a worker, with `slots.to_wire()` beside it; no lock is on it. The caller closes it.
        Raises OSError."""
        disk = reopened(self._opened.disk.fd, writable=self._opened.disk.writable)
        return disk.fd

    def has(self, key: bytes, model: bytes) -> bool:
        """Only looks."""
        with self._lock:
            entry = self._book.entries.get(key)
            return entry is not None and entry.place.model == model

    def find(self, key: bytes, model: bytes) -> Place:
        """Where an entry is, to be read by whoever has a descriptor (`slots.Slots`); counts as a use. Only looks.

        It may be evicted meanwhile: then the read is a miss. Raises SwapMiss.
        """
        with self._lock:
            try:
                return self._book.find(key, model, self._clock()).place
            except SwapMiss as error:
                self.counters.add(f"misses:{error.reason}")
                raise

    def value(self, key: bytes, saved_s: float, rate: float) -> None:
        """What an entry is worth as measured: seconds that a use saves, uses a second. Only looks."""
        with self._lock:
            self._book.value(key, Worth.of(saved_s, rate, self._clock()))

    def put(self, want: Want, content: int | memoryview, *, cancel: threading.Event | None = None) -> int:
        """Write an entry from a memfd or memory; the bytes written, 0 where it is there already.

        An image is on the disk for good when this returns, a block with a later snapshot.
        Raises SwapRefused, Cancelled.
        """
        lease = self.lease(MANAGER, want)
        if lease is None:
            return 0
        try:
            with _memory(content, want.nbytes) as memory:
                written = self._threads.run(
                    (
                        functools.partial(self.slots.write_run, lease.place, run, memory)
                        for run in self.slots.runs(lease.place)
                    ),
                    reading=False,
                    deadline_s=self.settings.deadline_s,
                    cancel=cancel,
                )
        except TimeoutError as error:
            # A write that hangs may still come: its slots must be nobody's.
            self._fail("a write hangs")
            raise SwapRefused("io", str(error)) from error
        except OSError as error:
            self.failed(MANAGER, lease.id, error)
            raise SwapRefused("io", os.strerror(error.errno or 0)) from error
        except Cancelled:
            self.abandon(MANAGER, lease.id)
            raise
        self.commit(MANAGER, [lease.id])
        if want.kind is Kind.IMAGE:
            self.flush()
            if self._read_only is not None:
                raise SwapRefused("io", self._read_only)
        return written

    def get(
        self,
        key: bytes,
        model: bytes,
        into: int | memoryview,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        cancel: threading.Event | None = None,
    ) -> int:
        """Read an entry's bytes [offset, offset + nbytes) (default: all from there on) into the beginning of memory or
        of a memfd; how many. Nothing of an entry that is found damaged is served: it is dropped.

        Raises SwapMiss (then what is in `into` is worth nothing), Cancelled.
        """
        place = self.find(key, model)
        wanted = place.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or wanted < 0 or offset + wanted > place.nbytes:
            raise ValueError(f"bytes {offset} to {offset + wanted} of an entry of {place.nbytes}")
        with self.held(key):
            try:
                with _memory(into, wanted, writable=True) as memory:
                    read = self._threads.run(
                        (self._reader(place, run, memory, offset) for run in self.slots.runs(place, offset, wanted)),
                        reading=True,
                        deadline_s=self.settings.deadline_s,
                        cancel=cancel,
                    )
            except SwapMiss as error:
                self.missed(place, error)
                raise
            except TimeoutError as error:
                self.counters.add("misses:io")
                raise SwapMiss("io", str(error)) from error
            except OSError as error:
                raise SwapMiss("memory", f"no memory to read into: {os.strerror(error.errno or 0)}") from error
        self.counters.add("hits")
        self.counters.add("read_bytes", read)
        return wanted

    def drop(self, key: bytes) -> bool:
        """Forget an entry."""
        with self._lock:
            return self._book.drop(key)

    def missed(self, place: Place, miss: SwapMiss) -> None:
        """A reader's miss at a place that `find` gave: an entry that is damaged is dropped, and counted. Only looks."""
        with self._lock:
            dropped = self._book.drop(place.key, generation=place.generation, retire=miss.reason == "io")
        if dropped:
            _log.warning("swap: damaged, dropped", key=place.key.hex()[:16], reason=miss.reason, error=str(miss))
        # Where the entry had gone before, its slots were another's by right.
        self.counters.add(f"misses:{miss.reason if dropped else 'absent'}")

    def lease(self, owner: str, want: Want) -> Lease | None:
        """Slots for an entry that `owner` then writes (`slots.Slots.write`) and commits; None where it is there.

        Raises SwapRefused.
        """
        try:
            return self._lease(owner, want)
        except SwapRefused as error:
            self.counters.add(f"refused:{error.reason}")
            raise

    def commit(self, owner: str, lease_ids: Sequence[int]) -> int:
        """These leases' slots are written; how many are entries now. Blocks for a snapshot where one is due."""
        count = 0
        with self._lock:
            for lease_id in lease_ids:
                if (entry := self._book.commit(owner, lease_id)) is not None:
                    count += 1
                    self.counters.add("writes")
                    self.counters.add("written_bytes", self._book.written_bytes(entry.place.nbytes))
            due = self._book.snapshot_due
        if due:
            self.flush()
        return count

    def abandon(self, owner: str, lease_id: int) -> bool:
        """A lease is given back unwritten. Only looks."""
        with self._lock:
            return self._book.abandon(owner, lease_id)

    def failed(self, owner: str, lease_id: int, error: OSError) -> None:
        """Writing a lease's slots failed: it is given back, and where that is the disk's fault no more is written.
        Who has no such lease is not believed."""
        if self.abandon(owner, lease_id) and of_the_disk(error):
            self._fail(f"a write failed: {os.strerror(error.errno or 0)}")

    def release(self, owner: str) -> int:
        """All leases of a worker whose process has ended are given back; how many. Only looks."""
        with self._lock:
            return self._book.release(owner)

    def flush(self) -> bool:
        """Everything committed is on the disk for good; False where it can't be."""
        return self._flush()

    def status(self) -> dict[str, Any]:
        """As JSON. Only looks."""
        with self._lock:
            book = self._book
            stride = self.layout.stride_bytes
            return {
                "path": str(self._opened.path),
                "total_bytes": self.layout.total_bytes,
                "slot_bytes": self.layout.slot_bytes,
                "slots": self.layout.slots,
                "free_slots": book.free_slots + book.quarantined_slots,
                "leased_slots": book.leased_slots,
                "retired_slots": book.retired_slots,
                "images": book.count[Kind.IMAGE],
                "image_bytes": book.held_slots[Kind.IMAGE] * stride,
                "blocks": book.count[Kind.BLOCK],
                "block_bytes": book.held_slots[Kind.BLOCK] * stride,
                "written_today_bytes": book.budget.used_bytes,
                "daily_write_bytes": book.budget.limit_bytes,
                "direct": self._opened.disk.direct,
                "ephemeral": self.settings.ephemeral,
                "read_only": self._read_only,
                "counters": self.counters.all(),
            }

    def close(self, deadline_s: float = 10.0) -> bool:
        """A last snapshot, and an end to the threads; False where one hangs in the kernel (then the file stays open).
        Idempotent."""
        if self._closed:
            return True
        self._closed = True
        ended = self._threads.close(deadline_s)
        if ended:
            if not self.settings.ephemeral:
                self._flush(last=True)
            self._opened.close()
        return ended

    def _resume(self) -> None:
        snapshot, damaged = self._snapshots.load()
        for why in damaged:
            self.counters.add("index_damaged")
            _log.warning("swap: one copy of the index is damaged", file=str(self._opened.path), reason=why)
        if self._opened.remade is not None:
            self.counters.add("remade")
            _log.warning("swap: made anew, empty", file=str(self._opened.path), reason=self._opened.remade)
        if snapshot is not None:
            try:
                self._book.resume(snapshot)
            except ValueError as error:
                self.counters.add("index_damaged")
                _log.warning("swap: index not used, begun empty", file=str(self._opened.path), reason=str(error))
                self._book = Book(self.layout, Budget(self.settings.daily_write_bytes), time.time_ns())
                self._book.generation = snapshot.generation
        if not self._opened.disk.direct:
            _log.warning(
                "swap: the file system refuses O_DIRECT: every byte is copied once more, through the page cache, which "
                "counts as this container's memory",
                file=str(self._opened.path),
            )

    def _lease(self, owner: str, want: Want) -> Lease | None:
        for _ in range(_ROUNDS):
            if self._closed or self._read_only is not None:
                raise SwapRefused("closed" if self._closed else "read_only", self._read_only or "the store is closed")
            with self._lock:
                now_s = self._clock()
                if not self._book.admit(want, now_s):
                    return None
                self.counters.add("evictions", self._book.make_room(want, now_s))
                lease = self._book.lease(owner, want, now_s)
                ahead_bytes = self._book.written_bytes(want.nbytes)
            if lease is not None:
                return lease
            self._flush(ahead_bytes=ahead_bytes)
        raise SwapRefused("busy", "others took the room that was made")

    def _flush(self, *, ahead_bytes: int = 0, last: bool = False) -> bool:
        """Whoever comes while another writes waits for that, and finds nothing left to do."""
        with self._flushing:
            with self._lock:
                used = last and self._book.used
                if self._read_only is not None:
                    return False
                if not (self._book.changed or ahead_bytes or used):
                    return True
                snapshot, freed = self._book.capture(ahead_bytes, self._clock(), last=last)
            try:
                self.counters.add("written_bytes", self._snapshots.save(snapshot))
            except OSError as error:
                with self._lock:
                    self._book.unsettle(freed)
                self._fail(f"the index can't be written: {os.strerror(error.errno or 0)}")
                return False
            with self._lock:
                self._book.settle(snapshot, freed)
            self.counters.add("snapshots")
            return True

    def _fail(self, why: str) -> None:
        self.counters.add("write_errors")
        if self._read_only is None:
            self._read_only = why
            _log.error("swap: read-only from now on", file=str(self._opened.path), reason=why)

    def _reader(self, place: Place, run: Run, memory: memoryview, offset: int) -> Callable[[], int]:
        return functools.partial(self.slots.read_run, place, run, memory, offset)

    @contextmanager
    def held(self, key: bytes) -> Iterator[None]:
        """It is not evicted meanwhile. Only looks."""
        with self._lock:
            self._book.hold(key)
        try:
            yield
        finally:
            with self._lock:
                self._book.let_go(key)


def open_store(
    settings: Settings,
    *,
    clock: Callable[[], float] = time.time,
    open_disk: opening.OpenDisk = reopened,
) -> SwapStore:
    """The store at the settings' path, made where it is not there and a size is given. Until `close` it is locked.

    Raises SwapInUse, SwapForeign, SwapUnavailable, ConfigError.
    """
    if settings.ephemeral:
        if settings.size_bytes is None:
            raise ConfigError("swap: an ephemeral store needs a size")
        opened = opening.anonymous(
            settings.path, size_bytes=settings.size_bytes, slot_bytes=settings.slot_bytes, open_disk=open_disk
        )
    else:
        opened = opening.acquire(
            settings.path, size_bytes=settings.size_bytes, slot_bytes=settings.slot_bytes, open_disk=open_disk
        )
    return SwapStore(opened, settings, clock=clock)


@contextmanager
def _memory(content: int | memoryview, nbytes: int, *, writable: bool = False) -> Iterator[memoryview]:
    """So many bytes of memory, or of a memfd while the context lasts. Raises OSError, ValueError where it has less."""
    there = os.fstat(content).st_size if isinstance(content, int) else content.nbytes
    if there < nbytes:
        raise ValueError(f"{nbytes} bytes of memory wanted, {there} given")
    if isinstance(content, memoryview):
        yield content.cast("B")[:nbytes]
        return
    mapping = Mapping(nbytes, content, writable=writable)
    try:
        yield memoryview(mapping.buffer).cast("B")
    except TimeoutError:
        # A thread hangs in the kernel, and may yet come to these addresses: they stay what they are.
        raise
    except BaseException:
        mapping.close()
        raise
    mapping.close()
