"""Where read bytes go. Each reader thread has a lane of its own.

A lane says which memory an extent is read into, and is told when it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mball.device.mapping import Mapping
from mball.device.memfd import Writer
from mball.loader.plan import CHUNK_BYTES, Chunk, Extent
from mball.loader.source import Source


class Lane(Protocol):
    def buffer(self, extent: Extent) -> memoryview:
        """Memory for the extent's bytes. Valid until `commit`."""

    def commit(self, extent: Extent) -> None:
        """The bytes are in the buffer: take them on to where they belong."""

    def finish(self) -> None:
        """Return once every committed byte has arrived."""


class HostLane:
    """Reads straight into a slab in host memory; through a scratch of one chunk where elements are cast."""

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self._memory = base.numpy().data
        self._scratch: Tensor | None = None

    def buffer(self, extent: Extent) -> memoryview:
        if extent.cast is None:
            return self._memory[extent.offset : extent.offset + extent.nbytes]
        if self._scratch is None:
            self._scratch = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        return self._scratch.numpy().data[: extent.nbytes]

    def commit(self, extent: Extent) -> None:
        if extent.cast is not None and self._scratch is not None:
            _put(extent, self._scratch, self._base)

    def finish(self) -> None:
        pass


class FileLane:
    """Writes into an image, through a scratch of one chunk."""

    def __init__(self, image: Writer) -> None:
        self._image = image
        self._scratch = memoryview(bytearray(CHUNK_BYTES))

    def buffer(self, extent: Extent) -> memoryview:
        return self._scratch[: extent.nbytes]

    def commit(self, extent: Extent) -> None:
        self._image.write(self._scratch[: extent.nbytes], extent.offset)

    def finish(self) -> None:
        pass


class TeeLane:
    """Another lane, and what goes through it is written into an image on the way. `shifts` are, by shard, what to add
    to a byte of its file to have the image's."""

    def __init__(self, lane: Lane, image: Writer, shifts: Sequence[int]) -> None:
        self._lane = lane
        self._image = image
        self._shifts = shifts
        self._buffer = memoryview(b"")

    def buffer(self, extent: Extent) -> memoryview:
        self._buffer = self._lane.buffer(extent)
        return self._buffer

    def commit(self, extent: Extent) -> None:
        self._image.write(self._buffer[: extent.nbytes], extent.start + self._shifts[extent.shard])
        self._lane.commit(extent)

    def finish(self) -> None:
        self._lane.finish()


class ScratchLane:
    """One thread's: whole chunks of a source, read into aligned memory and copied from there to where they belong."""

    def __init__(self, base: Tensor, source: Source, chunk_bytes: int) -> None:
        """`chunk_bytes` is the most that a chunk has. Raises OSError."""
        self._base = base
        self._source = source
        self._mapping = Mapping(chunk_bytes)
        self._memory = memoryview(self._mapping.buffer).cast("B")

    def take(self, chunk: Chunk) -> int:
        content = self._memory[: chunk.nbytes]
        if chunk.plain:
            self._source.read_into(content, chunk.shard, chunk.start)
        else:
            self._source.read_extent(content, chunk.extents[0])
        at = 0
        for extent in chunk.extents:
            _put(extent, torch.frombuffer(content[at : at + extent.nbytes], dtype=torch.uint8), self._base)
            at += extent.nbytes
        return chunk.nbytes

    def finish(self) -> None:
        self._mapping.close()


def _put(extent: Extent, buffer: Tensor, base: Tensor) -> None:
    source = buffer[: extent.nbytes]
    if extent.cast is None:
        base[extent.offset : extent.offset + extent.nbytes].copy_(source)
    else:
        end = extent.offset + extent.cast.target_bytes(extent.nbytes)
        target = base[extent.offset : end].view(extent.cast.target)
        target.copy_(source.view(extent.cast.source))
