"""Anonymous files in memory that are passed from process to process: the stuff that images are made of."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mball.device.mapping import Mapping
from mball.units import MiB

_NAME_CHARACTERS = 249 // 4
"""A name has at most 249 bytes, a character at most four."""
_F_SEAL_FUTURE_WRITE = 0x10
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
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
    """Fills a memfd, in transparent huge pages where the system allows them: those are registered with a GPU's driver
    in a fraction of the time that small ones take. Used by many threads."""

    def __init__(self, fd: int, *, huge: bool | None = None) -> None:
        """`huge`: None for what the system allows. Raises OSError."""
        self._fd = fd
        self._mapping: Mapping | None = None
        if huge_pages() if huge is None else huge:
            self._mapping = Mapping(os.fstat(fd).st_size, fd, writable=True)

    def write(self, content: memoryview, at: int) -> None:
        """Raises OSError: a full file system is one here, where a write through a mapping would end the process."""
        if self._mapping is not None:
            self._have_pages(self._mapping, at, len(content))
        written = 0
        while written < len(content):
            written += os.pwrite(self._fd, content[written:], at + written)

    def close(self) -> None:
        """Idempotent. The descriptor stays the caller's."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None

    @staticmethod
    def _have_pages(mapping: Mapping, at: int, nbytes: int) -> None:
        # A write alone takes small pages: only a fault in a mapping that asked for huge ones brings them.
        begin = at // _HUGE_BYTES * _HUGE_BYTES
        end = min(-(-(at + nbytes) // _HUGE_BYTES) * _HUGE_BYTES, mapping.whole_pages)
        if begin < end:
            mapping.populate(begin, end - begin)
            # The pages stay in the file; mapped they would count as this process's own.
            mapping.forget(begin, end - begin)


def huge_pages(setting: Path = SHMEM_ENABLED) -> bool:
    """Whether memory of a memfd may be huge pages for those that ask."""
    try:
        chosen = setting.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return False
    return chosen in ("always", "within_size", "advise", "force")
