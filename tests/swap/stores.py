"""Small stores, what is put into them, and disks that fail."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from mball.swap.book import Want
from mball.swap.disk import Disk, aligned, reopened
from mball.swap.index import Kind
from mball.swap.place import digest
from mball.swap.store import Settings, SwapStore, open_store
from mball.units import KiB, MiB

SLOT = 16 * KiB
SIZE = 2 * MiB
MODEL = digest("a model")


def settings(path: Path, **changed: object) -> Settings:
    given: dict[str, object] = {"size_bytes": SIZE, "slot_bytes": SLOT, "threads": 2, "deadline_s": 60.0, **changed}
    return Settings(path, **given)  # type: ignore[arg-type]


def open_at(path: Path, **changed: object) -> SwapStore:
    return open_store(settings(path, **changed))


def content(name: str, nbytes: int) -> memoryview:
    """Page-aligned; always the same for a name."""
    memory = aligned(nbytes)
    memory[:] = random.Random(name).randbytes(nbytes)
    return memory


def image(name: str, nbytes: int, saved_s: float = 100.0) -> Want:
    return Want(Kind.IMAGE, digest("image", name), MODEL, nbytes, saved_s)


def block(name: str, nbytes: int = SLOT, parent: str | None = None, saved_s: float = 1.0) -> Want:
    above = digest("block", parent) if parent is not None else None
    return Want(Kind.BLOCK, digest("block", name), MODEL, nbytes, saved_s, parent=above)


def get(store: SwapStore, want: Want) -> bytes:
    """Raises SwapMiss."""
    memory = aligned(want.nbytes)
    assert store.get(want.key, want.model, memory) == want.nbytes
    return bytes(memory)


class CountingDisk(Disk):
    """Calls `before(n, name)` before its n-th change: allocate, truncate, write, sync; it may raise, or end it all."""

    def __init__(self, disk: Disk, before: Callable[[int, str], None]) -> None:
        super().__init__(os.dup(disk.fd), direct=disk.direct, writable=disk.writable)
        disk.close()
        self.before = before
        self.count = 0
        self._lock = threading.Lock()

    def _step(self, name: str) -> None:
        with self._lock:
            self.count += 1
            self.before(self.count, name)

    def pwritev(self, parts: Sequence[memoryview], at: int) -> int:
        self._step("write")
        return super().pwritev(parts, at)

    def sync(self) -> None:
        self._step("sync")
        super().sync()

    def allocate(self, nbytes: int) -> None:
        self._step("allocate")
        super().allocate(nbytes)

    def truncate(self, nbytes: int) -> None:
        self._step("truncate")
        super().truncate(nbytes)


def counting(before: Callable[[int, str], None]) -> Callable[..., Disk]:
    def open_disk(fd: int, *, writable: bool = True) -> Disk:
        return CountingDisk(reopened(fd, writable=writable), before)

    return open_disk


def failing_at(number: int, error: int = errno.EIO, *, for_good: bool = False) -> Callable[[int, str], None]:
    def before(count: int, name: str) -> None:
        if count == number or (for_good and count > number):
            raise OSError(error, os.strerror(error))

    return before


def killing_at(number: int) -> Callable[[int, str], None]:
    def before(count: int, name: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return before
