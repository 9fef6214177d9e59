"""The check of what is read against a manifest's digests, in the threads that read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import xxhash

from mball.errors import DigestMismatch
from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import Extent
from mball.loader.reader import Source
from mball.units import MiB

_GAP_BYTES = 1 * MiB


class Verifier:
    """Groups planned extents by the manifest's, and checks each group while one thread reads it."""

    def __init__(self, checkpoint: Checkpoint, extent_bytes: int, digests: Sequence[Sequence[str]]) -> None:
        """`digests` are the xxh3_64 of each shard's extents, in hex."""
        self._checkpoint = checkpoint
        self._extent_bytes = extent_bytes
        self._digests = digests

    def units(self, extents: Iterable[Extent]) -> list[list[Extent]]:
        """The same bytes, cut where the manifest's extents end (a cast one at the element before), grouped by them."""
        groups: dict[tuple[int, int], list[Extent]] = {}
        for extent in extents:
            begin = self._checkpoint.shards[extent.shard].data_start
            for part in _cut(extent, begin, self._extent_bytes):
                groups.setdefault((part.shard, self._number(part)), []).append(part)
        return [sorted(group, key=lambda part: part.start) for group in groups.values()]

    def begin(self, unit: Sequence[Extent], source: Source) -> Check:
        """The check of one unit, to be told of its extents in order."""
        shard, number = unit[0].shard, self._number(unit[0])
        start, end = _bounds(self._checkpoint, shard, number, self._extent_bytes)

        def judge(digest: str) -> None:
            if digest != self._digests[shard][number]:
                raise mismatch(self._checkpoint, shard, number, self._extent_bytes)

        return Check(source, shard, start, end, judge)

    def _number(self, part: Extent) -> int:
        # By its last byte: a part of whole elements may begin a few bytes before the manifest's extent.
        return (part.start + part.nbytes - 1 - self._checkpoint.shards[part.shard].data_start) // self._extent_bytes


class Check:
    """Digests bytes [start, end) of a shard as they are read. What no extent wants of them is read for this alone."""

    def __init__(self, source: Source, shard: int, start: int, end: int, judge: Callable[[str], None]) -> None:
        self._source = source
        self._shard = shard
        self._at = start
        self._end = end
        self._judge = judge
        self._digest = xxhash.xxh3_64()

    def update(self, extent: Extent, buffer: memoryview) -> None:
        self._skip_to(extent.start)
        # What lies before was digested already: bytes that fill two tensors are read twice.
        fresh = buffer[max(0, self._at - extent.start) : max(0, self._end - extent.start)]
        self._digest.update(fresh)
        self._at += len(fresh)

    def end(self) -> None:
        """Raises DigestMismatch."""
        self._skip_to(self._end)
        self._judge(self._digest.hexdigest())

    def _skip_to(self, to: int) -> None:
        if self._at >= to:
            return
        scratch = memoryview(bytearray(min(to - self._at, _GAP_BYTES)))
        while self._at < to:
            part = scratch[: to - self._at]
            self._source.read_into(part, self._shard, self._at)
            self._digest.update(part)
            self._at += len(part)


def mismatch(checkpoint: Checkpoint, shard: int, number: int, extent_bytes: int) -> DigestMismatch:
    """The error for one extent: it names the first tensor in it, and how many more there are."""
    start, end = _bounds(checkpoint, shard, number, extent_bytes)
    inside = [
        info.name
        for info in checkpoint.tensors.values()
        if info.shard == shard and info.start < end and info.end > start
    ]
    more = f" (it holds {len(inside) - 1} more)" if len(inside) > 1 else ""
    return DigestMismatch(
        f"extent {number}, bytes {start} to {end}{more}, is not what the manifest was made of: fetch the file again",
        file=str(checkpoint.shards[shard].path),
        tensor=inside[0] if inside else None,
        extent=number,
    )


def _bounds(checkpoint: Checkpoint, shard: int, number: int, extent_bytes: int) -> tuple[int, int]:
    place = checkpoint.shards[shard]
    start = place.data_start + number * extent_bytes
    return start, min(start + extent_bytes, place.size_bytes)


def _cut(extent: Extent, begin: int, extent_bytes: int) -> Iterator[Extent]:
    item = extent.cast.source.itemsize if extent.cast is not None else 1
    at = 0
    while at < extent.nbytes:
        border = extent_bytes - (extent.start + at - begin) % extent_bytes
        nbytes = min(max(border // item * item, item), extent.nbytes - at)
        offset = extent.offset + (extent.cast.target_bytes(at) if extent.cast is not None else at)
        yield replace(extent, start=extent.start + at, nbytes=nbytes, offset=offset)
        at += nbytes
