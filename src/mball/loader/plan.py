"""What is read, from where, to where: pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mball.units import MiB

if TYPE_CHECKING:  # the manager reads sizes by this module, and starts without torch
    import torch

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
class Runs:
    """Bytes that lie apart: runs of `run_bytes`, one every `stride_bytes` of the file."""

    run_bytes: int
    stride_bytes: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, start + nbytes) of a shard's file, to be put at `offset` of the destination (cast on the way).

    With `runs` the `nbytes` are those of the runs together, the first of which begins at `start`.
    """

    shard: int
    start: int
    nbytes: int
    offset: int
    cast: Cast | None = None
    runs: Runs | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Extents that follow one another in a shard's file without a gap; or a single one, where it is cast or in runs."""

    shard: int
    start: int
    nbytes: int
    extents: tuple[Extent, ...]

    @property
    def plain(self) -> bool:
        """The file's bytes as they are, in one piece."""
        return self.extents[0].cast is None and self.extents[0].runs is None


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


def grouped(extents: Iterable[Extent], chunk_bytes: int, shifts: Sequence[int] | None = None) -> Iterator[Chunk]:
    """The same bytes in the order of the files, neighbours in the file together.

    No chunk reaches over a multiple of `chunk_bytes` (itself one of 8 KiB) of the position, which is the byte of the
    file plus the shard's of `shifts`; a cast one, and one in runs, is merely not larger than half of `chunk_bytes`.
    """
    group: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.shard, extent.start)):
        shift = shifts[extent.shard] if shifts is not None else 0
        for part in _cut(extent, chunk_bytes, shift):
            if group and not _joins(group, part, chunk_bytes, shift):
                yield _chunk(group)
                group = []
            group.append(part)
    if group:
        yield _chunk(group)


def _cut(extent: Extent, chunk_bytes: int, shift: int) -> Iterator[Extent]:
    if extent.cast is not None or extent.runs is not None:
        yield from _split(extent, chunk_bytes // 2)
        return
    at = 0
    while at < extent.nbytes:
        nbytes = min(chunk_bytes - (extent.start + at + shift) % chunk_bytes, extent.nbytes - at)
        yield Extent(extent.shard, extent.start + at, nbytes, extent.offset + at)
        at += nbytes


def _joins(group: list[Extent], part: Extent, chunk_bytes: int, shift: int) -> bool:
    last = group[-1]
    return (
        _plain(last)
        and _plain(part)
        and last.shard == part.shard
        and last.start + last.nbytes == part.start
        and (part.start + shift) % chunk_bytes != 0
    )


def _chunk(group: list[Extent]) -> Chunk:
    joined: list[Extent] = []
    for extent in group:
        if joined and _continues(joined[-1], extent):
            last = joined.pop()
            extent = replace(last, nbytes=last.nbytes + extent.nbytes)
        joined.append(extent)
    return Chunk(group[0].shard, group[0].start, sum(extent.nbytes for extent in group), tuple(joined))


def uncovered(extents: Iterable[Extent], begin: int, end: int) -> list[tuple[int, int]]:
    """The parts of bytes [begin, end) of a shard's file that none of its extents reads, as (start, nbytes)."""
    gaps: list[tuple[int, int]] = []
    at = begin
    for extent in sorted(extents, key=lambda extent: extent.start):
        if extent.start > at:
            gaps.append((at, extent.start - at))
        at = max(at, extent.start + extent.nbytes)
    return [*gaps, (at, end - at)] if at < end else gaps


def _plain(extent: Extent) -> bool:
    return extent.cast is None and extent.runs is None


def _continues(last: Extent, extent: Extent) -> bool:
    return (
        _plain(last)
        and _plain(extent)
        and last.shard == extent.shard
        and last.start + last.nbytes == extent.start
        and last.offset + last.nbytes == extent.offset
    )


def _split(extent: Extent, chunk_bytes: int) -> Iterable[Extent]:
    runs = extent.runs
    # Whole runs: those that are larger than a chunk are no runs but extents of their own.
    step = max(chunk_bytes // runs.run_bytes, 1) * runs.run_bytes if runs else chunk_bytes
    for at in range(0, extent.nbytes, step):
        offset = extent.offset + (extent.cast.target_bytes(at) if extent.cast else at)
        start = extent.start + (at // runs.run_bytes * runs.stride_bytes if runs else at)
        yield replace(extent, start=start, nbytes=min(step, extent.nbytes - at), offset=offset)
