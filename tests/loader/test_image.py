import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mball.errors import Cancelled, ReadError
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.reader import Source
from tests.loader.files import open_descriptors, write_sharded


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    shards = {"1.safetensors": {"a": torch.randn(3001), "b": torch.randn(7)}, "2.safetensors": {"c": torch.randn(5000)}}
    return Checkpoint.open(write_sharded(tmp_path, shards))


@pytest.fixture
def fd(checkpoint: Checkpoint) -> Iterator[int]:
    fd = image.create("test", checkpoint.image_bytes)
    yield fd
    os.close(fd)


def test_it_holds_every_shards_data_at_its_place(checkpoint: Checkpoint, fd: int) -> None:
    assert image.fill(checkpoint, fd) == sum(shard.data_bytes for shard in checkpoint.shards)
    for shard in checkpoint.shards:
        stored = os.pread(fd, shard.data_bytes, shard.image_offset)
        assert stored == shard.path.read_bytes()[shard.data_start :]


def test_a_sealed_image_can_be_read_and_not_changed(checkpoint: Checkpoint, fd: int) -> None:
    image.fill(checkpoint, fd)
    image.seal(fd)
    before = os.pread(fd, checkpoint.image_bytes, 0)
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 20)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with mmap.mmap(fd, checkpoint.image_bytes, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == before


def test_an_image_of_another_size_is_refused(checkpoint: Checkpoint, fd: int) -> None:
    os.ftruncate(fd, checkpoint.image_bytes - mmap.PAGESIZE)
    with pytest.raises(ReadError, match=f"wants {checkpoint.image_bytes} bytes"):
        image.fill(checkpoint, fd)
    with pytest.raises(ReadError, match="its image has"):
        Source(checkpoint, fd)


def test_filling_can_be_cancelled(checkpoint: Checkpoint, fd: int) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        image.fill(checkpoint, fd, cancel=cancel)


def test_a_read_only_descriptor_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with (tmp_path / "plain").open("wb") as file:
        file.truncate(checkpoint.image_bytes)
    fd = os.open(tmp_path / "plain", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as raised:
            image.fill(checkpoint, fd)
    finally:
        os.close(fd)
    assert raised.value.errno == errno.EACCES


def test_a_size_that_cannot_be_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with pytest.raises(OSError):
        image.create("test", -1)
    assert open_descriptors() == before
