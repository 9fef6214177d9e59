"""Anonymous files in memory that are passed from process to process: the stuff that images are made of."""

from __future__ import annotations

import fcntl
import os

_NAME_CHARACTERS = 249 // 4
"""A name has at most 249 bytes, a character at most four."""
_F_SEAL_FUTURE_WRITE = 0x10
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
