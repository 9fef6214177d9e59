"""Planned extents, read by several threads straight into the memory of their lanes."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from mball.errors import Cancelled, ReadError
from mball.loader.checkpoint import Checkpoint
from mball.loader.lanes import Lane
from mball.loader.plan import Extent

if TYPE_CHECKING:
    from mball.loader.verify import Verifier

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from the thread that called the loader."""

STALL_S = 120.0
"""A load in which no byte arrives for so long has failed."""

GRACE_S = 10.0
"""How long the other threads may take to end their read once one has failed."""

_TICK_S = 0.1


class Source:
    """A checkpoint's opened bytes: its shards, or its image where `image_fd` is given (not closed here)."""

    def __init__(self, checkpoint: Checkpoint, image_fd: int | None = None) -> None:
        self._checkpoint = checkpoint
        self._image_fd = image_fd
        self._fds: list[int] = []
        try:
            if image_fd is not None:
                _check_size(image_fd, checkpoint.image_bytes, "its image", checkpoint.path)
            else:
                for shard in checkpoint.shards:
                    self._fds.append(_open(shard.path))
                    _check_size(self._fds[-1], shard.size_bytes, "the file", shard.path)
        except ReadError:
            self.close()
            raise

    def read_into(self, buffer: memoryview, shard: int, start: int) -> None:
        """Fill the buffer from byte `start` of a shard's file. Raises ReadError, naming the file and the tensor."""
        at = 0
        while at < len(buffer):
            try:
                count = self._read(buffer[at:], shard, start + at)
            except OSError as error:
                raise self._error(
                    f"reading at byte {start + at} failed: {error.strerror}", shard, start + at
                ) from error
            if count == 0:
                short = f"ends at byte {start + at}, {len(buffer) - at} more were wanted: it shrank while it was read"
                raise self._error(short, shard, start + at)
            at += count

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _read(self, buffer: memoryview, shard: int, start: int) -> int:
        if self._image_fd is None:
            return os.preadv(self._fds[shard], [buffer], start)
        place = self._checkpoint.shards[shard]
        return os.preadv(self._image_fd, [buffer], place.image_offset + start - place.data_start)

    def _error(self, message: str, shard: int, at: int) -> ReadError:
        return ReadError(
            message, file=str(self._checkpoint.shards[shard].path), tensor=self._checkpoint.tensor_at(shard, at)
        )


def read(
    extents: Sequence[Extent],
    source: Source,
    open_lane: Callable[[], Lane],
    *,
    threads: int,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    verify: Verifier | None = None,
) -> int:
    """Read every extent, in about the order given; the bytes read. Closes the source.

    Raises the first failing thread's error (ReadError; DigestMismatch from `verify`; OSError from a FileLane),
    Cancelled, or TimeoutError after STALL_S without a byte. Then no thread writes any more, unless its read hangs in
    the kernel.
    """
    units = verify.units(extents) if verify is not None else [[extent] for extent in extents]
    work = deque(units)
    meter = _Meter(sum(extent.nbytes for extent in extents))
    stop = threading.Event()

    def stopped() -> bool:
        return stop.is_set() or (cancel is not None and cancel.is_set())

    def run() -> None:
        lane = open_lane()
        try:
            while not stopped():
                try:
                    unit = work.popleft()
                except IndexError:
                    return
                check = verify.begin(unit, source) if verify is not None else None
                for extent in unit:
                    if stopped():
                        return
                    buffer = lane.buffer(extent)
                    source.read_into(buffer, extent.shard, extent.start)
                    if check is not None:
                        check.update(extent, buffer)
                    lane.commit(extent)
                    meter.add(extent.nbytes)
                if check is not None:
                    check.end()
        finally:
            lane.finish()

    workers = max(1, min(threads, len(units)))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="mball-read")
    running = {pool.submit(run) for _ in range(workers)}
    try:
        _watch(running, meter, progress)
    finally:
        stop.set()
        _, running = wait(running, GRACE_S)
        pool.shutdown(wait=not running)
        # A descriptor closed under a hanging read could be another file's before that thread looks again.
        if not running:
            source.close()
    if meter.done != meter.total:
        raise Cancelled(f"loading was cancelled after {meter.done} of {meter.total} bytes")
    return meter.total


class _Meter:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes


def _watch(running: set[Future[None]], meter: _Meter, progress: Progress | None) -> None:
    """Until every thread has ended, raising what the first failing one raised."""
    seen, deadline = 0, time.monotonic() + STALL_S
    while running:
        ended, running = wait(running, _TICK_S, FIRST_EXCEPTION)
        for future in ended:
            future.result()
        if progress is not None:
            progress(meter.done, meter.total)
        if meter.done != seen:
            seen, deadline = meter.done, time.monotonic() + STALL_S
        elif running and time.monotonic() > deadline:
            raise TimeoutError(f"no byte arrived for {STALL_S:.0f} s ({meter.done} of {meter.total} bytes are there)")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ReadError(f"cannot be opened: {error.strerror}", file=str(path)) from error


def _check_size(fd: int, size_bytes: int, what: str, path: Path) -> None:
    found = os.fstat(fd).st_size
    if found != size_bytes:
        raise ReadError(f"{what} has {found} bytes, not the {size_bytes} that its header describes", file=str(path))
