"""The store's only way to its file: whole blocks in, whole blocks out."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mball.device.vectored import MOST_BUFFERS, after
from mball.swap.layout import BLOCK_BYTES


class Disk:
    """An open file or block device. `direct`: around the page cache; then every buffer, offset and length is a multiple
    of BLOCK_BYTES. Thread-safe. All methods raise OSError."""

    def __init__(self, fd: int, *, direct: bool, writable: bool = True) -> None:
        self.fd = fd
        self.direct = direct
        self.writable = writable

    def read(self, parts: Sequence[memoryview], at: int) -> int:
        """Fills all parts from byte `at`; their bytes. EIO where the file ends before."""
        left = list(parts)
        done = 0
        while left:
            count = self.preadv(left[:MOST_BUFFERS], at + done)
            if count == 0:
                raise OSError(errno.EIO, f"the file ends at byte {at + done}")
            done += count
            left = after(left, count)
        self._forget(at, done)
        return done

    def write(self, parts: Sequence[memoryview], at: int) -> int:
        left = list(parts)
        done = 0
        while left:
            count = self.pwritev(left[:MOST_BUFFERS], at + done)
            done += count
            left = after(left, count)
        return done

    def preadv(self, parts: Sequence[memoryview], at: int) -> int:
        return os.preadv(self.fd, parts, at)

    def pwritev(self, parts: Sequence[memoryview], at: int) -> int:
        return os.pwritev(self.fd, parts, at)

    def sync(self) -> None:
        """All that was written to the file, by whichever process, is on the disk. After an error it may be lost, and a
        second call would not say so."""
        os.fdatasync(self.fd)
        self._forget(0, 0)

    def allocate(self, nbytes: int) -> None:
        """So many bytes of the file are there: writing to them wants no more space."""
        os.posix_fallocate(self.fd, 0, nbytes)

    def truncate(self, nbytes: int) -> None:
        os.ftruncate(self.fd, nbytes)

    @property
    def is_block_device(self) -> bool:
        return stat.S_ISBLK(os.fstat(self.fd).st_mode)

    @property
    def nbytes(self) -> int:
        if self.is_block_device:
            return os.lseek(self.fd, 0, os.SEEK_END)
        return os.fstat(self.fd).st_size

    @property
    def allocated_bytes(self) -> int:
        """What the file takes on its disk; fewer than its size where it has holes."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _forget(self, at: int, nbytes: int) -> None:
        """What went through the page cache is not wanted there: it counts as the container's, and pushes others out."""
        if not self.direct:
            os.posix_fadvise(self.fd, at, nbytes, os.POSIX_FADV_DONTNEED)


def reopened(fd: int, *, writable: bool = True) -> Disk:
    """The very file that `fd` is of, whatever its name stands for by now, with a descriptor of its own that no lock is
    on: around the page cache where the file system allows that."""
    name = f"/proc/self/fd/{fd}"
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        direct = os.open(name, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    else:
        if _reads_directly(direct):
            return Disk(direct, direct=True, writable=writable)
        os.close(direct)
    return Disk(os.open(name, flags), direct=False, writable=writable)


def aligned(nbytes: int) -> memoryview:
    """New memory that begins at a page."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:nbytes]


def is_aligned(content: memoryview) -> bool:
    address: int = np.frombuffer(content, np.uint8).__array_interface__["data"][0] if len(content) else 0
    return address % BLOCK_BYTES == 0


def sync_folder(path: Path) -> None:
    """The names in a file's folder are on the disk, too."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reads_directly(fd: int) -> bool:
    """Some file systems take the flag, and refuse the read."""
    block = aligned(BLOCK_BYTES)
    try:
        os.preadv(fd, [block], 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
