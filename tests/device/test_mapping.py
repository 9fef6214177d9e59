import errno
import os
from pathlib import Path

import psutil
import pytest

from mball.device.mapping import Mapping, map_file, pages
from mball.units import KiB, MiB
from tests.loader.files import mapping_of


def test_anonymous_memory_is_there_once_it_is_populated_and_gone_when_closed() -> None:
    mapping = Mapping(8 * MiB)
    assert mapping_of(mapping.address)[1]["Rss"] == 0
    mapping.populate(2 * MiB, 2 * MiB)
    assert mapping_of(mapping.address + 2 * MiB)[1]["Rss"] >= 2 * MiB
    memoryview(mapping.buffer).cast("B")[:4] = b"abcd"
    assert bytes(mapping.buffer[:4]) == b"abcd"
    address = mapping.address
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError):
        mapping_of(address)


@pytest.mark.parametrize("nbytes", [2 * MiB, 8 * MiB + 32 * KiB, 6 * MiB - 1])
def test_large_anonymous_memory_begins_at_a_huge_page_and_holds_no_more(nbytes: int) -> None:
    space = psutil.Process().memory_info
    before_bytes = space().vms
    mappings = [Mapping(nbytes) for _ in range(8)]
    took_bytes = space().vms - before_bytes
    assert all(mapping.address % (2 * MiB) == 0 for mapping in mappings)
    assert took_bytes < 8 * (nbytes + MiB)
    for mapping in mappings:
        memoryview(mapping.buffer).cast("B")[-1:] = b"x"
        mapping.close()
    assert space().vms - before_bytes < 8 * MiB


def test_a_file_is_mapped_read_only_and_shared(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    fd = os.open(path, os.O_RDONLY)
    mapping = map_file(fd)
    os.close(fd)
    mapping.populate(0, 16384)
    assert bytes(mapping.buffer) == path.read_bytes()
    assert mapping_of(mapping.address)[0] == str(path)
    with path.open("r+b") as file:
        file.write(b"new")
    assert bytes(mapping.buffer[:3]) == b"new"
    mapping.close()


def test_a_file_that_ends_before_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MiB))
    fd = os.open(path, os.O_RDONLY)
    mapping = map_file(fd)
    os.close(fd)
    os.truncate(path, 4096)
    with pytest.raises(OSError) as raised:
        mapping.populate(0, MiB)
    assert raised.value.errno == errno.EFAULT
    mapping.close()


def test_the_pages_of_bytes() -> None:
    assert pages(0, 4096) == (0, 4096)
    assert pages(4095, 2) == (0, 8192)
    assert pages(5000, 10) == (4096, 4096)
