"""How much of a file is in the page cache."""

from __future__ import annotations

import ctypes
import errno
import mmap

from mball.device import libc
from mball.device.mapping import Mapping, pages

_CACHESTAT = 451
_LOWEST_BIT = bytes(value & 1 for value in range(256))
_MISSING = (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EACCES)


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


def resident_share(fd: int, start: int, nbytes: int) -> float | None:
    """The share of the pages of bytes [start, start + nbytes) that are in the page cache, 0 to 1.

    None where the system won't say: neither cachestat (Linux 6.5) nor mincore is there or allowed for this file.
    """
    begin, length = pages(start, nbytes)
    if length == 0:
        return 1.0
    share = by_cachestat(fd, begin, length)
    return share if share is not None else by_mincore(fd, begin, length)


def by_cachestat(fd: int, start: int, nbytes: int) -> float | None:
    wanted, counts = _Range(start, nbytes), _Counts()
    if libc.LIBC.syscall(_CACHESTAT, fd, ctypes.byref(wanted), ctypes.byref(counts), 0) != 0:
        failed = libc.error("cachestat")
        if failed.errno in _MISSING:
            return None
        raise failed
    return min(1.0, int(counts.cache) * mmap.PAGESIZE / nbytes)


def by_mincore(fd: int, start: int, nbytes: int) -> float | None:
    """mincore(2) answers for every page of a file that the caller may not write as if it were there: a file of another
    owner is `all there`."""
    try:
        mapping = Mapping(start + nbytes, fd)
    except OSError:
        return None
    try:
        flags = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
        if libc.LIBC.mincore(mapping.address + start, nbytes, ctypes.byref(flags)) != 0:
            return None
        return bytes(flags).translate(_LOWEST_BIT).count(1) / len(flags)
    finally:
        mapping.close()
