"""Files in the page cache, or out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mball.bench.contenders import Cannot
from mball.device.residency import by_mincore, resident_share
from mball.units import MiB, format_bytes

_SCRATCH_BYTES = 8 * MiB


def warm(paths: Iterable[Path]) -> None:
    """Read what is not all in the page cache, so that it is."""
    for path in paths:
        with _opened(path) as fd:
            size = os.fstat(fd).st_size
            if resident_share(fd, 0, size) == 1.0:
                continue
            scratch = bytearray(_SCRATCH_BYTES)
            for at in range(0, size, _SCRATCH_BYTES):
                os.preadv(fd, [scratch], at)


def drop(paths: Iterable[Path]) -> None:
    """Out of the page cache, and seen to be. Raises Cannot where pages stay, as on a file system in memory."""
    for path in paths:
        with _opened(path) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        left = resident_bytes(path)
        if left:
            raise Cannot(f"{format_bytes(left)} of {path.name} stay in the page cache")


def resident_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache, by mincore."""
    with _opened(path) as fd:
        size = os.fstat(fd).st_size
        if size == 0:
            return 0
        share = by_mincore(fd, 0, -(-size // os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PAGE_SIZE"))
    if share is None:
        raise Cannot(f"the system does not say what of {path.name} is in the page cache")
    return round(share * size)


def copy_model(model: Path, target: Path) -> Path:
    """A copy of a model's files whose bytes are on the disk. Raises OSError."""
    target.mkdir(parents=True)
    for file in sorted(model.iterdir()):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
            with _opened(target / file.name) as fd:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return target


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
