"""Whose bytes lie in which slots, and the header that every slot says it with: pure."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from mball.swap.checksum import CHECKSUM_BYTES, KNOWN, OURS, checksum
from mball.swap.layout import BLOCK_BYTES, Layout

DIGEST_BYTES = 32
_MAGIC = b"MBALSLOT"
_FIELDS = struct.Struct("<8sIIQQ32s32s16s")
_KIND = slice(8, 12)


def digest(*parts: str | bytes) -> bytes:
    """SHA-256 of the parts, each with its length before it: ("ab", "c") is not ("a", "bc")."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()


class Extent(NamedTuple):
    """A run of slots."""

    first: int
    slots: int


class Run(NamedTuple):
    """Slots that follow each other, in the file and in the entry: `slot` holds the entry's part `ordinal`."""

    slot: int
    ordinal: int
    slots: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry's bytes are, and whose. `key` and `model` are SHA-256s; no two writes have the same generation."""

    key: bytes
    model: bytes
    generation: int
    nbytes: int
    extents: tuple[Extent, ...]

    @property
    def slots(self) -> int:
        return sum(extent.slots for extent in self.extents)

    def runs(self, first: int, count: int, most: int) -> Iterator[Run]:
        """The entry's parts [first, first + count) in order, at most `most` at a time."""
        begin, end = 0, first + count
        for extent in self.extents:
            at = max(first, begin)
            stop = min(end, begin + extent.slots)
            while at < stop:
                taken = min(most, stop - at)
                yield Run(extent.first + at - begin, at, taken)
                at += taken
            begin += extent.slots

    def payload_bytes(self, ordinal: int, layout: Layout) -> int:
        """What part `ordinal` holds: a slot's worth, or the rest."""
        return min(layout.slot_bytes, self.nbytes - ordinal * layout.slot_bytes)

    def to_wire(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "key": self.key.hex(),
            "model": self.model.hex(),
            "generation": self.generation,
            "nbytes": self.nbytes,
            "extents": [list(extent) for extent in self.extents],
        }

    @classmethod
    def from_wire(cls, said: dict[str, Any]) -> Place:
        """Raises ValueError, KeyError and TypeError for what `to_wire` did not write."""
        return cls(
            bytes.fromhex(said["key"]),
            bytes.fromhex(said["model"]),
            int(said["generation"]),
            int(said["nbytes"]),
            tuple(Extent(int(first), int(count)) for first, count in said["extents"]),
        )


def header(place: Place, ordinal: int, payload: memoryview, store_id: bytes) -> bytes:
    """The header's used bytes for this payload. Its checksum is over the fields and the payload, so that a right one
    proves both."""
    fields = _fields(place, ordinal, payload, store_id, OURS)
    return fields + checksum(OURS, fields, payload)


HEADER_BYTES = _FIELDS.size + CHECKSUM_BYTES


def kind_of(found: bytes) -> int:
    """Which checksum a header read was written with; ours where it is none that can be checked here."""
    kind = _kind(found)
    return kind if kind in KNOWN else OURS


def difference(
    found: bytes, place: Place, ordinal: int, payload: memoryview, store_id: bytes, *, proven: bool = True
) -> str | None:
    """None where a header read is the one wanted; `stale` where another write's is there, else `checksum`.

    Where the payload is not to be `proven` the header alone is: whose it is, and which part.
    """
    kind = kind_of(found) if proven else _kind(found)
    fields = _fields(place, ordinal, payload, store_id, kind)
    if found[: _FIELDS.size] != fields:
        return "stale" if found[: len(_MAGIC)] == _MAGIC else "checksum"
    right = not proven or found[_FIELDS.size : HEADER_BYTES] == checksum(kind, fields, payload)
    return None if right else "checksum"


def _fields(place: Place, ordinal: int, payload: memoryview, store_id: bytes, kind: int) -> bytes:
    return _FIELDS.pack(_MAGIC, kind, ordinal, len(payload), place.generation, place.key, place.model, store_id)


def _kind(found: bytes) -> int:
    return int.from_bytes(found[_KIND], "little")


if HEADER_BYTES > BLOCK_BYTES:
    raise RuntimeError("a slot's header is larger than its block")
