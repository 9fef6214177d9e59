"""System calls that Python has no name for, or makes while holding the GIL."""

from __future__ import annotations

import ctypes
import errno
import os

EINVAL = errno.EINVAL

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
LIBC.syscall.restype = ctypes.c_long


def error(call: str) -> OSError:
    """The calling thread's last error of a call through LIBC."""
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
