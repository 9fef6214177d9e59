"""What the store holds, as bytes and back: pure. A snapshot is whole or nothing."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from mball.swap.checksum import CHECKSUM_BYTES, XXH3, checksum
from mball.swap.layout import (
    ENTRY_BYTES,
    EXTENT_BYTES,
    INDEX_HEADER_BYTES,
    VERSION,
    Damaged,
    Layout,
    whole_blocks,
)
from mball.swap.place import DIGEST_BYTES, Extent, Place
from mball.swap.policy import Worth

_MAGIC = b"MBALINDX"
_HEADER = struct.Struct("<8sIIQQQQII16s16s")
_CHECKSUM = slice(_HEADER.size - 16, _HEADER.size)
_ENTRY = struct.Struct("<B3xI32s32s32sQQddd")
_EXTENT = struct.Struct("<II")
_NO_PARENT = bytes(DIGEST_BYTES)


class Kind(IntEnum):
    IMAGE = 1
    BLOCK = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """`parent` is the key of the KV block that this one continues."""

    kind: Kind
    place: Place
    worth: Worth
    parent: bytes | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`generation` grows with every snapshot, `next_generation` is above that of every write so far. `day` and
    `written_bytes` are the write budget's."""

    generation: int
    next_generation: int
    day: int
    written_bytes: int
    entries: Sequence[Entry]

    def encode(self, store_id: bytes) -> bytes:
        """Whole blocks."""
        extents = [extent for entry in self.entries for extent in entry.place.extents]
        header = _HEADER.pack(
            _MAGIC,
            VERSION,
            0,
            self.generation,
            self.next_generation,
            self.day,
            self.written_bytes,
            len(self.entries),
            len(extents),
            store_id,
            bytes(16),
        ).ljust(INDEX_HEADER_BYTES, b"\0")
        body = b"".join(map(_record, self.entries)) + b"".join(_EXTENT.pack(*extent) for extent in extents)
        data = header[: _CHECKSUM.start] + checksum(XXH3, header, body) + header[_CHECKSUM.stop :] + body
        return data.ljust(whole_blocks(len(data)), b"\0")

    @classmethod
    def decode(cls, data: bytes, layout: Layout, store_id: bytes) -> Snapshot:
        """Raises Damaged for anything but what `encode` made for this store."""
        if len(data) < encoded_bytes(data, layout, store_id):
            raise Damaged("the index is cut off")
        _, _, _, generation, following, day, written, entries, extents, _, said = _HEADER.unpack_from(data)
        end = INDEX_HEADER_BYTES + entries * ENTRY_BYTES + extents * EXTENT_BYTES
        header = data[: _CHECKSUM.start] + bytes(CHECKSUM_BYTES) + data[_CHECKSUM.stop : INDEX_HEADER_BYTES]
        if said != checksum(XXH3, header, data[INDEX_HEADER_BYTES:end]):
            raise Damaged("the index's checksum is wrong")
        places = _EXTENT.iter_unpack(data[INDEX_HEADER_BYTES + entries * ENTRY_BYTES : end])
        found = []
        for number in range(entries):
            kind, count, key, model, parent, written_as, nbytes, saved_s, heat, at_s = _ENTRY.unpack_from(
                data, INDEX_HEADER_BYTES + number * ENTRY_BYTES
            )
            place = Place(key, model, written_as, nbytes, tuple(Extent(*next(places)) for _ in range(count)))
            worth = Worth(saved_s, heat, at_s)
            found.append(Entry(Kind(kind), place, worth, None if parent == _NO_PARENT else parent))
        return cls(generation, following, day, written, found)


def encoded_bytes(head: bytes, layout: Layout, store_id: bytes) -> int:
    """How long the snapshot is that begins so. Raises Damaged where none of this store does."""
    if len(head) < INDEX_HEADER_BYTES:
        raise Damaged("the index is cut off")
    magic, version, _, _, _, _, _, entries, extents, owner, _ = _HEADER.unpack_from(head)
    if magic != _MAGIC:
        raise Damaged("no index" if any(head[:INDEX_HEADER_BYTES]) else "never written")
    if version != VERSION or owner != store_id:
        raise Damaged("another store's index")
    nbytes: int = INDEX_HEADER_BYTES + entries * ENTRY_BYTES + extents * EXTENT_BYTES
    if whole_blocks(nbytes) > layout.index_bytes:
        raise Damaged(f"an index of {nbytes} bytes")
    return whole_blocks(nbytes)


def snapshot_bytes(entries: int, extents: int) -> int:
    """What a snapshot of so many takes on the disk."""
    return whole_blocks(INDEX_HEADER_BYTES + entries * ENTRY_BYTES + extents * EXTENT_BYTES)


def _record(entry: Entry) -> bytes:
    place, worth = entry.place, entry.worth
    return _ENTRY.pack(
        entry.kind,
        len(place.extents),
        place.key,
        place.model,
        entry.parent or _NO_PARENT,
        place.generation,
        place.nbytes,
        worth.saved_s,
        worth.heat,
        worth.at_s,
    )


if _HEADER.size > INDEX_HEADER_BYTES or _ENTRY.size != ENTRY_BYTES or _EXTENT.size != EXTENT_BYTES:
    raise RuntimeError("the index's records are not as large as the layout says")
