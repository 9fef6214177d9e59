"""What is read, from where, to where: pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mball.units import MiB

CHUNK_BYTES = 8 * MiB
"""The most one read takes: large enough for the disk and the bus, small enough to share among threads."""

ALIGN_BYTES = 64
"""Tensors begin at multiples of this in their slab: a cache line, and a whole number of elements of any dtype."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Elements stored as `source` and wanted as `target`; both of whole bytes."""

    source: torch.dtype
    target: torch.dtype

    def target_bytes(self, source_bytes: int) -> int:
        return source_bytes // self.source.itemsize * self.target.itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, start + nbytes) of a shard's file, to be put at `offset` of the destination (cast on the way)."""

    shard: int
    start: int
    nbytes: int
    offset: int
    cast: Cast | None = None


def aligned(offset: int, align_bytes: int = ALIGN_BYTES) -> int:
    """The next multiple of `align_bytes`."""
    return -(-offset // align_bytes) * align_bytes


def chunked(extents: Iterable[Extent], chunk_bytes: int = CHUNK_BYTES) -> list[Extent]:
    """The same bytes in the order of the files: neighbours joined, then none over `chunk_bytes` (a multiple of 16)."""
    chunks: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.shard, extent.start)):
        last = chunks[-1] if chunks else None
        if last is not None and _continues(last, extent) and last.nbytes < chunk_bytes:
            extent = replace(last, nbytes=last.nbytes + extent.nbytes)
            chunks.pop()
        chunks.extend(_split(extent, chunk_bytes))
    return chunks


def _continues(last: Extent, extent: Extent) -> bool:
    return (
        last.cast is None
        and extent.cast is None
        and last.shard == extent.shard
        and last.start + last.nbytes == extent.start
        and last.offset + last.nbytes == extent.offset
    )


def _split(extent: Extent, chunk_bytes: int) -> Iterable[Extent]:
    for at in range(0, extent.nbytes, chunk_bytes):
        offset = extent.offset + (extent.cast.target_bytes(at) if extent.cast else at)
        yield replace(extent, start=extent.start + at, nbytes=min(chunk_bytes, extent.nbytes - at), offset=offset)
