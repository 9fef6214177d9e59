from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mball.device import memfd
from mball.device.mapping import Mapping
from mball.units import MiB


def test_a_sealed_file_takes_no_writes_and_keeps_its_size() -> None:
    fd = memfd.create("é" * 300, 4096)
    try:
        os.pwrite(fd, b"abc", 0)
        memfd.seal(fd)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        assert os.pread(fd, 3, 0) == b"abc"
    finally:
        os.close(fd)


@pytest.mark.parametrize("populates", [True, False])
def test_what_is_written_from_many_threads_is_there_and_nothing_stays_mapped(
    monkeypatch: pytest.MonkeyPatch, populates: bool
) -> None:
    if not populates:
        monkeypatch.setattr(Mapping, "populate", lambda mapping, offset, nbytes: False)
    nbytes = 5 * MiB + 12_345
    content = memoryview(bytearray(os.urandom(nbytes)))
    fd = memfd.create("image", nbytes)
    try:
        writer = memfd.Writer(fd)
        parts = [(at, content[at : at + MiB + 1]) for at in range(0, nbytes, MiB + 1)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda part: writer.write(part[1], part[0]), parts))
        assert "memfd:image" in Path("/proc/self/maps").read_text()
        writer.close()
        writer.close()
        assert "memfd:image" not in Path("/proc/self/maps").read_text()
        memfd.seal(fd)
        assert os.pread(fd, nbytes, 0) == content
    finally:
        os.close(fd)


def test_pages_that_are_written_do_not_count_as_the_writer_s() -> None:
    fd = memfd.create("image", 64 * MiB)
    try:
        writer = memfd.Writer(fd)
        before = _rss_bytes()
        content = memoryview(bytearray(8 * MiB))
        for at in range(0, 64 * MiB, 8 * MiB):
            writer.write(content, at)
        assert _rss_bytes() - before < 32 * MiB
        writer.close()
    finally:
        os.close(fd)


def test_no_memory_for_pages_is_an_error_of_the_write() -> None:
    fd = memfd.create("image", 4 * MiB)
    try:
        writer = memfd.Writer(fd)
        os.ftruncate(fd, 0)
        with pytest.raises(OSError, match="madvise"):
            writer.write(memoryview(bytearray(4096)), 0)
        with pytest.raises(OSError, match="of an image of"):
            writer.write(memoryview(bytearray(4096)), 4 * MiB - 4095)
        writer.close()
    finally:
        os.close(fd)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
