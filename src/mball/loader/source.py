"""A checkpoint's opened bytes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from mball.device.mapping import Mapping, map_file
from mball.device.residency import resident_share
from mball.device.vectored import MOST_BUFFERS, after
from mball.errors import ReadError
from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import Extent
from mball.units import KiB

ALIGN_BYTES = 4096
"""Direct reads begin and end at multiples of this, in the file and in memory."""

GAP_BYTES = 64 * KiB
"""Between runs that are read by one call, the bytes between them too: to copy so many takes less than another call."""

_SAMPLES = 32
_SAMPLE_BYTES = 256 * KiB
"""The kernel looks at every page that is asked about: for a whole model that takes a tenth of a second."""


ImageReader = Callable[[memoryview, int], None]
"""Fills memory from a byte of the source image on, wherever that is kept. Raises SwapMiss where it can't be had."""


class Source:
    """A checkpoint's shards, or its image: in a memfd (`image_fd`, not closed here), or as `stored` reads it."""

    def __init__(self, checkpoint: Checkpoint, image_fd: int | None = None, stored: ImageReader | None = None) -> None:
        self._checkpoint = checkpoint
        self._image_fd = image_fd
        self._stored = stored if image_fd is None else None
        self._fds: list[int] = []
        self._direct: dict[int, int | None] = {}
        self._mappings: dict[int, Mapping] = {}
        self._lock = threading.Lock()
        try:
            if image_fd is not None:
                _check_size(image_fd, checkpoint.image_bytes, "its image", checkpoint.path)
            elif stored is None:
                for shard in checkpoint.shards:
                    self._fds.append(_open(shard.path))
                    _check_size(self._fds[-1], shard.size_bytes, "the file", shard.path)
        except ReadError:
            self.close()
            raise

    @property
    def image_fd(self) -> int | None:
        return self._image_fd

    @property
    def is_files(self) -> bool:
        """Whether it is the shards themselves."""
        return self._image_fd is None and self._stored is None

    @property
    def shifts(self) -> list[int]:
        """By shard: what to add to a byte of its file to have the byte of what is read."""
        if self.is_files:
            return [0] * len(self._checkpoint.shards)
        return self._checkpoint.image_shifts

    def read_into(self, buffer: memoryview, shard: int, start: int) -> None:
        """Fill the buffer from byte `start` of a shard's file. Raises ReadError, naming the file and the tensor."""
        self._fill([buffer], shard, start)

    def read_extent(self, buffer: memoryview, extent: Extent) -> None:
        """As `read_into`, of an extent whose bytes may lie in runs."""
        if extent.runs is None:
            self.read_into(buffer, extent.shard, extent.start)
            return
        run_bytes, stride_bytes = extent.runs.run_bytes, extent.runs.stride_bytes
        gap_bytes = stride_bytes - run_bytes
        runs = [buffer[at : at + run_bytes] for at in range(0, extent.nbytes, run_bytes)]
        step = MOST_BUFFERS // 2 if gap_bytes <= GAP_BYTES and self._stored is None else 1
        gap = memoryview(bytearray(gap_bytes if step > 1 else 0))
        for first in range(0, len(runs), step):
            there = runs[first : first + step]
            buffers = [gap] * (2 * len(there) - 1)
            buffers[::2] = there
            self._fill(buffers, extent.shard, extent.start + first * stride_bytes)

    def read_direct(self, buffer: memoryview, shard: int, start: int, nbytes: int) -> int | None:
        """Read past the page cache; where in the buffer byte `start` is, or None where the file system refuses.

        `buffer` is aligned to ALIGN_BYTES and has room for the whole blocks that the bytes lie in. Raises ReadError.
        """
        fd = self._direct_fd(shard)
        if fd is None:
            return None
        begin = start // ALIGN_BYTES * ALIGN_BYTES
        wanted = start + nbytes - begin
        room = -(-wanted // ALIGN_BYTES) * ALIGN_BYTES
        at = 0
        while at < wanted:
            try:
                count = os.preadv(fd, [buffer[at:room]], begin + at)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self._refuse_direct(shard)
                    return None
                raise self._failed(error, shard, max(start, begin + at)) from error
            if count < ALIGN_BYTES and at + count < wanted:
                raise self._short(shard, max(start, begin + at + count), wanted - at - count)
            # After a short read the next begins at a whole block again.
            at += count if at + count >= wanted else count // ALIGN_BYTES * ALIGN_BYTES
        return start - begin

    def resident_share(self, shard: int, start: int, nbytes: int) -> float | None:
        """Of these bytes of a shard's file, as far as it goes; an image is all there.

        None where the system won't say.
        """
        if self._image_fd is not None:
            return 1.0
        nbytes = min(nbytes, self._checkpoint.shards[shard].size_bytes - start)
        try:
            return resident_share(self._fds[shard], start, nbytes)
        except OSError as error:
            raise self._failed(error, shard, start) from error

    def mostly_resident(self) -> bool:
        """Whether most of what is looked at, a sample of every shard, is there; so is what the system won't tell, and
        what is in a store is not. Raises ReadError.
        """
        if self._stored is not None:
            return False
        found = []
        for number, shard in enumerate(self._checkpoint.shards):
            step = max(_SAMPLE_BYTES, shard.size_bytes // _SAMPLES)
            found += [self.resident_share(number, at, _SAMPLE_BYTES) for at in range(0, shard.size_bytes, step)]
        return sum(1.0 if share is None else share for share in found) >= len(found) / 2

    def drop(self, shard: int, start: int, nbytes: int) -> None:
        """Let the page cache forget these bytes of a shard's file."""
        if self.is_files:
            os.posix_fadvise(self._fds[shard], start, nbytes, os.POSIX_FADV_DONTNEED)

    def mapping(self, shard: int) -> Mapping:
        """All of a shard's file, read-only, until `close`. Raises OSError."""
        with self._lock:
            if shard not in self._mappings:
                self._mappings[shard] = map_file(self._fds[shard])
            return self._mappings[shard]

    def whole(self, shard: int) -> bool:
        """Whether the shard's file still has its size: what a mapping shows past a file's end is no error there."""
        return os.fstat(self._fds[shard]).st_size == self._checkpoint.shards[shard].size_bytes

    def close(self) -> None:
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()
        for fd in self._direct.values():
            if fd is not None:
                os.close(fd)
        self._direct.clear()
        while self._fds:
            os.close(self._fds.pop())

    def _fill(self, buffers: list[memoryview], shard: int, start: int) -> None:
        """With bytes that follow one another."""
        at, wanted = 0, sum(map(len, buffers))
        while at < wanted:
            try:
                count = self._read(buffers, shard, start + at)
            except OSError as error:
                raise self._failed(error, shard, start + at) from error
            if count == 0:
                raise self._short(shard, start + at, wanted - at)
            at += count
            if at < wanted:
                buffers = after(buffers, count)

    def _read(self, buffers: list[memoryview], shard: int, start: int) -> int:
        if self.is_files:
            return os.preadv(self._fds[shard], buffers, start)
        place = self._checkpoint.shards[shard]
        if self._stored is not None:
            self._stored(buffers[0], place.image_offset + start - place.data_start)
            return len(buffers[0])
        if self._image_fd is None:
            raise RuntimeError("a source of nothing")
        return os.preadv(self._image_fd, buffers, place.image_offset + start - place.data_start)

    def _direct_fd(self, shard: int) -> int | None:
        with self._lock:
            if shard not in self._direct:
                self._direct[shard] = _open_direct(self._fds[shard]) if self.is_files else None
            return self._direct[shard]

    def _refuse_direct(self, shard: int) -> None:
        """The descriptor stays open to the end: others may be reading through it."""
        with self._lock:
            fd = self._direct[shard]
            self._direct[shard] = None
            if fd is not None:
                self._fds.append(fd)

    def _failed(self, error: OSError, shard: int, at: int) -> ReadError:
        return self._error(f"reading at byte {at} failed: {error.strerror}", shard, at)

    def _short(self, shard: int, at: int, missing_bytes: int) -> ReadError:
        return self._error(
            f"ends at byte {at}, {missing_bytes} more were wanted: it shrank while it was read", shard, at
        )

    def _error(self, message: str, shard: int, at: int) -> ReadError:
        return ReadError(
            message, file=str(self._checkpoint.shards[shard].path), tensor=self._checkpoint.tensor_at(shard, at)
        )


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ReadError(f"cannot be opened: {error.strerror}", file=str(path)) from error


def _open_direct(fd: int) -> int | None:
    """The very file that `fd` is of, whatever its name stands for by now."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def _check_size(fd: int, size_bytes: int, what: str, path: Path) -> None:
    found = os.fstat(fd).st_size
    if found != size_bytes:
        raise ReadError(f"{what} has {found} bytes, not the {size_bytes} that its header describes", file=str(path))
