"""Anonymous files in memory that are passed from process to process: the stuff that images are made of."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from mball.device.mapping import Mapping
from mball.units import MiB

_NAME_CHARACTERS = 249 // 4
"""A name has at most 249 bytes, a character at most four."""
_F_SEAL_FUTURE_WRITE = 0x10
_HUGE_BYTES = 2 * MiB
_SEALS = _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, nbytes: int) -> int:
    """An empty memfd of `nbytes`; no memory yet. `name` shows in /proc/PID/fd. The caller closes it."""
    fd = os.memfd_create(name[:_NAME_CHARACTERS], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """Let nobody write, grow or shrink it any more. Mappings that are writable already stay so."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


class Writer:
    """Fills a memfd from many threads at once, in transparent huge pages where the system allows them: those are
    registered with a GPU's driver in a fraction of the time that small ones take."""

    def __init__(self, fd: int) -> None:
        """Raises OSError."""
        self._fd = fd
        # write(2) holds the file's lock: through it many threads are no faster than one, and get small pages alone.
        self._mapping = Mapping(os.fstat(fd).st_size, fd, writable=True)

    def write(self, content: memoryview, at: int) -> None:
        """Content that is read-only goes the slow way. Raises OSError."""
        if at + len(content) > self._mapping.nbytes:
            raise OSError(errno.ENOSPC, f"{at + len(content)} bytes of an image of {self._mapping.nbytes}")
        begin = at // _HUGE_BYTES * _HUGE_BYTES
        end = min(-(-(at + len(content)) // _HUGE_BYTES) * _HUGE_BYTES, self._mapping.whole_pages)
        # With the pages there before, no memory for them is an error here, and no signal at the copy.
        if begin < end and self._mapping.populate(begin, end - begin) and not content.readonly:
            source = ctypes.addressof(ctypes.c_char.from_buffer(content))
            ctypes.memmove(self._mapping.address + at, source, len(content))
            # The pages stay in the file; mapped they would count as this process's own.
            self._mapping.forget(begin, end - begin)
            return
        written = 0
        while written < len(content):
            written += os.pwrite(self._fd, content[written:], at + written)

    def close(self) -> None:
        """Idempotent. The descriptor stays the caller's."""
        self._mapping.close()
