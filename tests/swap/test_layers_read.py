"""Layers read straight to where a GPU copies them from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mball.device.mapping import Mapping
from mball.errors import Cancelled
from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import Extent, chunked
from mball.loader.source import ALIGN_BYTES
from mball.swap.layers_read import PART_BYTES, Readers, staged

SIZES = (3, 1, 4096, 70_001, 5 * (1 << 20) + 7, 128)


@pytest.fixture(params=["/tmp", "/dev/shm"], ids=["a disk", "memory, which has no direct reads"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    if not Path(request.param).is_dir():
        pytest.skip(f"there is no {request.param}")
    path = Path(tempfile.mkdtemp(dir=request.param))
    yield path
    shutil.rmtree(path)


def parts_of(checkpoint: Checkpoint) -> list[Extent]:
    extents, offset = [], 0
    for info in checkpoint.tensors.values():
        extents.append(Extent(info.shard, info.start, info.nbytes, offset))
        offset += -(-info.nbytes // 256) * 256
    return chunked(extents, PART_BYTES)


@pytest.mark.parametrize("cached", [True, False])
def test_each_part_is_in_its_place(folder: Path, cached: bool) -> None:
    torch.manual_seed(1)
    file = folder / "model.safetensors"
    save_file({f"t{n}": torch.randint(0, 255, (size,), dtype=torch.uint8) for n, size in enumerate(SIZES)}, file)
    with file.open("rb") as opened:
        whole = opened.read()
        if not cached:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    checkpoint = Checkpoint.open(folder)
    parts = parts_of(checkpoint)
    assert any(part.start % ALIGN_BYTES for part in parts)
    assert max(part.nbytes for part in parts) == PART_BYTES
    stage = staged(parts)
    readers = Readers(checkpoint, None, 3)
    mapping = Mapping(stage.nbytes)
    try:
        for _ in range(3):
            readers.stage(parts, stage, mapping).wait(60)
            memory = memoryview(mapping.buffer).cast("B")
            for part, place in zip(parts, stage.places, strict=True):
                assert memory[place : place + part.nbytes] == whole[part.start : part.start + part.nbytes]
            memory[:] = bytes(len(memory))
            memory.release()
        readers.cancel()
        with pytest.raises(Cancelled):
            readers.stage(parts, stage, mapping).wait(60)
    finally:
        assert readers.close()
        mapping.close()


def test_places_do_not_touch() -> None:
    parts = [Extent(0, start, nbytes, 0) for start, nbytes in ((5, 4091), (4096, 1), (4097, 8192), (9, 3))]
    stage = staged(parts)
    blocks = [
        (place - part.start % ALIGN_BYTES, -(-(place + part.nbytes) // ALIGN_BYTES) * ALIGN_BYTES)
        for part, place in zip(parts, stage.places, strict=True)
    ]
    assert all(first % ALIGN_BYTES == 0 for first, _ in blocks)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(blocks))
    assert blocks[-1][1] == stage.nbytes
