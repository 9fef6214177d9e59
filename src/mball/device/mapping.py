"""Memory mapped by hand: its addresses can be registered with a GPU's driver, and no call here holds the GIL."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

from mball.device import libc
from mball.units import MiB

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_HUGE_BYTES = 2 * MiB
_MAP_FAILED = ctypes.c_void_p(-1).value


class Mapping:
    """Anonymous private memory, or the pages of a file (`fd`, which may be closed afterwards), read-only or `writable`.

    `buffer` exports the bytes to torch and memoryview without a copy and without owning them: after `close` its memory
    must not be touched any more, and what a file's mapping exports must never be written.
    """

    def __init__(self, nbytes: int, fd: int | None = None, *, writable: bool = False) -> None:
        """Address space only. Raises OSError."""
        self.nbytes = nbytes
        self._writable = writable or fd is None
        protection = mmap.PROT_READ | mmap.PROT_WRITE if self._writable else mmap.PROT_READ
        flags = mmap.MAP_SHARED if fd is not None else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        # Whether the kernel begins it at a huge page depends on its version and on the length; a disk that reads into
        # what is half in small pages takes a quarter longer.
        spare = _HUGE_BYTES if fd is None and nbytes >= _HUGE_BYTES else 0
        address = libc.LIBC.mmap(None, max(nbytes, 1) + spare, protection, flags, -1 if fd is None else fd, 0)
        if address is None or address == _MAP_FAILED:
            raise libc.error("mmap")
        self.address = int(address)
        if spare:
            self.address = -(-self.address // _HUGE_BYTES) * _HUGE_BYTES
            before = self.address - address
            for at, unused in ((address, before), (self.address + self.whole_pages, spare - before)):
                if unused:
                    libc.LIBC.munmap(at, unused)
        if self._writable:
            # Only a hint: without it the memory is there all the same.
            libc.LIBC.madvise(self.address, nbytes, mmap.MADV_HUGEPAGE)

    @property
    def buffer(self) -> ctypes.Array[Any]:
        return (ctypes.c_ubyte * self.nbytes).from_address(self.address)

    def populate(self, offset: int, nbytes: int) -> bool:
        """Have pages behind these bytes (`offset` a multiple of a page) before they are touched.

        Raises OSError: ENOMEM where there is no memory, EFAULT where the file ends before, EIO. False where the kernel
        can't (before 5.14), and does it at the first touch.
        """
        advice = _MADV_POPULATE_WRITE if self._writable else _MADV_POPULATE_READ
        if libc.LIBC.madvise(self.address + offset, nbytes, advice) != 0:
            failed = libc.error("madvise")
            if failed.errno != libc.EINVAL:
                raise failed
            return False
        return True

    def forget(self, offset: int, nbytes: int) -> None:
        """Map these bytes of a file (whole pages) no more until they are touched again. Private ones are lost."""
        libc.LIBC.madvise(self.address + offset, nbytes, mmap.MADV_DONTNEED)

    @property
    def whole_pages(self) -> int:
        """Bytes of all its pages, the last one as a whole."""
        return -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def close(self) -> None:
        """Idempotent."""
        if self.address:
            libc.LIBC.munmap(self.address, max(self.nbytes, 1))
            self.address = 0


def pages(start: int, nbytes: int) -> tuple[int, int]:
    """The whole pages that bytes [start, start + nbytes) lie in, as (start, nbytes)."""
    begin = start // mmap.PAGESIZE * mmap.PAGESIZE
    return begin, -(-(start + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE - begin


def map_file(fd: int) -> Mapping:
    """All of an open file, read-only. Raises OSError."""
    return Mapping(os.fstat(fd).st_size, fd)
