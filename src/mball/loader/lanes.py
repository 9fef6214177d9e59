"""Where read bytes go. Each reader thread has a lane of its own.

A lane says which memory an extent is read into, and is told when it is there.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from mball.loader.plan import CHUNK_BYTES, Extent

RING_DEPTH = 2


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


class CudaLane:
    """Reads into a small ring of pinned buffers, copied to the device on a stream of its own."""

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self._stream = torch.cuda.Stream(base.device)  # type: ignore[no-untyped-call]
        # The slab's memory may still be in use by work queued before.
        self._stream.wait_stream(torch.cuda.current_stream(base.device))
        self._ring = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(RING_DEPTH)]
        self._copied = [torch.cuda.Event() for _ in range(RING_DEPTH)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def buffer(self, extent: Extent) -> memoryview:
        self._copied[self._turn].synchronize()
        return self._ring[self._turn].numpy().data[: extent.nbytes]

    def commit(self, extent: Extent) -> None:
        with torch.cuda.stream(self._stream):
            _put(extent, self._ring[self._turn], self._base)
            self._copied[self._turn].record()
        self._turn = (self._turn + 1) % RING_DEPTH

    def finish(self) -> None:
        self._stream.synchronize()


class FileLane:
    """Writes into a file, such as an image, through a scratch of one chunk. A full file system is an OSError here,
    where a mapping would end the process with SIGBUS."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._scratch = memoryview(bytearray(CHUNK_BYTES))

    def buffer(self, extent: Extent) -> memoryview:
        return self._scratch[: extent.nbytes]

    def commit(self, extent: Extent) -> None:
        written = 0
        while written < extent.nbytes:
            written += os.pwrite(self._fd, self._scratch[written : extent.nbytes], extent.offset + written)

    def finish(self) -> None:
        pass


def _put(extent: Extent, buffer: Tensor, base: Tensor) -> None:
    source = buffer[: extent.nbytes]
    if extent.cast is None:
        base[extent.offset : extent.offset + extent.nbytes].copy_(source, non_blocking=True)
    else:
        end = extent.offset + extent.cast.target_bytes(extent.nbytes)
        target = base[extent.offset : end].view(extent.cast.target)
        target.copy_(source.view(extent.cast.source), non_blocking=True)
