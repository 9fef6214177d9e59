from __future__ import annotations

import os

import pytest

from mball.device import memfd


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
