"""Changes of a folder's files, as the kernel tells them (inotify(7)): nothing is looked at while nothing happens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from mball.device.libc import LIBC, error

_MODIFY = 0x2
_CLOSE_WRITE = 0x8
_MOVED_TO = 0x80
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_MOST = 64 * 1024

LIBC.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


def watch(folders: Iterable[Path], *, unfinished: bool = False) -> int:
    """A descriptor that can be read once a file of one of these folders was written and closed, or has been moved
    there: how editors, and Kubernetes, replace one; `unfinished`: also while it is written. The caller's.

    Raises OSError."""
    mask = _CLOSE_WRITE | _MOVED_TO | (_MODIFY if unfinished else 0)
    fd: int = LIBC.inotify_init1(_NONBLOCK_CLOEXEC)
    if fd < 0:
        raise error("inotify_init1")
    for folder in folders:
        if LIBC.inotify_add_watch(fd, os.fsencode(folder), mask) < 0:
            failed = error(f"inotify_add_watch {folder}")
            os.close(fd)
            raise failed
    return fd


def drain(fd: int) -> None:
    """Forgets what has happened so far."""
    try:
        while os.read(fd, _MOST):
            pass
    except BlockingIOError:
        return
