import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mball.device import libc, residency
from mball.device.residency import by_cachestat, by_mincore, resident_share
from mball.units import MiB
from tests.needs import missing

Probe = Callable[[int, int, int], float | None]


@pytest.fixture
def half_cached(tmp_path: Path) -> int:
    """The first 4 MiB of 8 are in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MiB))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.pread(fd, 4 * MiB, 0)
    yield fd
    os.close(fd)


def has_cachestat() -> bool:
    """Its arguments are looked at only where it is there and allowed."""
    libc.LIBC.syscall(451, -1, None, None, 0)
    return ctypes.get_errno() in (errno.EBADF, errno.EFAULT, errno.EINVAL)


@pytest.mark.parametrize("probe", [by_cachestat, by_mincore])
def test_what_is_in_the_page_cache(half_cached: int, probe: Probe) -> None:
    if probe is by_cachestat and not has_cachestat():
        missing("page-cache", "this kernel has no cachestat, or does not let it be used")
    if {other(half_cached, 4 * MiB, 4 * MiB) for other in (by_cachestat, by_mincore)} <= {1.0, None}:
        missing("page-cache", "by all that tells, this file system keeps everything")
    assert probe(half_cached, 0, 4 * MiB) == 1.0
    assert probe(half_cached, 4 * MiB, 4 * MiB) == pytest.approx(0.0, abs=0.1)
    assert probe(half_cached, 2 * MiB, 4 * MiB) == pytest.approx(0.5, abs=0.1)


def test_mincore_where_there_is_no_cachestat(half_cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = resident_share(half_cached, 5000, 2 * MiB)
    monkeypatch.setattr(residency, "_CACHESTAT", 100_000)
    assert by_cachestat(half_cached, 0, 4096) is None
    assert resident_share(half_cached, 5000, 2 * MiB) == wanted == 1.0
    monkeypatch.setattr(residency, "by_mincore", lambda *arguments: None)
    assert resident_share(half_cached, 5000, 2 * MiB) is None


def test_a_descriptor_that_is_none_is_an_error() -> None:
    with pytest.raises(OSError) as raised:
        by_cachestat(-1, 0, 4096)
    assert raised.value.errno in (errno.EBADF, libc.EINVAL)


def test_no_bytes_are_all_there(half_cached: int) -> None:
    assert resident_share(half_cached, 4096, 0) == 1.0
