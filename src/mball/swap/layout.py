"""Where everything is in a store's file: pure.

    block 0, 1   the superblock, twice
    block 2      who holds it (for people; nothing relies on it)
    index 0, 1   two areas of equal size, each with room for the largest index
    slots        each a header block, then its payload

Everything begins at a multiple of BLOCK_BYTES and is written in such multiples, as O_DIRECT wants it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from mball.errors import ConfigError
from mball.swap.checksum import CHECKSUM_BYTES, XXH3, checksum
from mball.units import MiB, format_bytes

BLOCK_BYTES = 4096
SLOT_BYTES = 2 * MiB
VERSION = 1
MAGIC = b"MBALLSWP"

SUPERBLOCKS = 2
HOLDER_AT = SUPERBLOCKS * BLOCK_BYTES
_INDEX_AT = HOLDER_AT + BLOCK_BYTES

INDEX_HEADER_BYTES = 128
ENTRY_BYTES = 144
EXTENT_BYTES = 8

_MOST_SLOT_BYTES = 1 << 30
_MOST_SLOTS = (1 << 32) - 1

_SUPERBLOCK = struct.Struct("<8sIIQQ16s32sd")
_MAKING, _READY = 0, 1


def whole_blocks(nbytes: int) -> int:
    """The bytes of all blocks that so many bytes lie in."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Layout:
    """`slot_bytes` is what a slot holds; on the disk its header block comes before."""

    slot_bytes: int
    slots: int

    @classmethod
    def of_size(cls, size_bytes: int, slot_bytes: int = SLOT_BYTES) -> Layout:
        """The most slots that a file of so many bytes has room for. Raises ConfigError."""
        if slot_bytes <= 0 or slot_bytes % BLOCK_BYTES or slot_bytes > _MOST_SLOT_BYTES:
            raise ConfigError(f"swap: a slot is a multiple of 4 KiB up to 1 GiB, not {slot_bytes} bytes")
        each = slot_bytes + BLOCK_BYTES + 2 * (ENTRY_BYTES + EXTENT_BYTES)
        slots = min(_MOST_SLOTS, (size_bytes - _INDEX_AT - 2 * INDEX_HEADER_BYTES) // each)
        # Rounding the index areas up may take what one slot would have needed.
        if slots > 0 and cls(slot_bytes, slots).total_bytes > size_bytes:
            slots -= 1
        if slots < 1:
            raise ConfigError(f"swap: {format_bytes(size_bytes)} have no room for a slot of {format_bytes(slot_bytes)}")
        return cls(slot_bytes, slots)

    @property
    def index_bytes(self) -> int:
        """Of one area: every slot may be an entry of its own, or an extent of its own."""
        return whole_blocks(INDEX_HEADER_BYTES + self.slots * (ENTRY_BYTES + EXTENT_BYTES))

    def index_at(self, area: int) -> int:
        return _INDEX_AT + area * self.index_bytes

    @property
    def stride_bytes(self) -> int:
        """From one slot to the next."""
        return self.slot_bytes + BLOCK_BYTES

    def slot_at(self, slot: int) -> int:
        return _INDEX_AT + 2 * self.index_bytes + slot * self.stride_bytes

    @property
    def total_bytes(self) -> int:
        return self.slot_at(self.slots)

    def slots_for(self, nbytes: int) -> int:
        """Slots that an entry of so many bytes takes; at least one."""
        return max(1, -(-nbytes // self.slot_bytes))

    @property
    def digest(self) -> bytes:
        """SHA-256 of every number that says where something is."""
        places = (VERSION, BLOCK_BYTES, self.slot_bytes, self.slots, self.index_at(0), self.index_at(1))
        return hashlib.sha256(",".join(map(str, (*places, self.slot_at(0), self.total_bytes))).encode()).digest()


class Damaged(Exception):
    """What was read is not what was written, or not all of it; says why."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """Written when the store is made, and never again. `store_id` is in every slot and index of this store."""

    layout: Layout
    store_id: bytes
    created_at: float

    def encode(self, *, ready: bool = True) -> bytes:
        """One block. One that is not ready is of a store that is being made: it is ours, and holds nothing."""
        fields = _SUPERBLOCK.pack(
            MAGIC,
            VERSION,
            _READY if ready else _MAKING,
            self.layout.slot_bytes,
            self.layout.slots,
            self.store_id,
            self.layout.digest,
            self.created_at,
        )
        return (fields + checksum(XXH3, fields)).ljust(BLOCK_BYTES, b"\0")

    @classmethod
    def decode(cls, block: bytes) -> Superblock:
        """Raises Damaged."""
        magic, version, state, slot_bytes, slots, store_id, digest, created_at = _SUPERBLOCK.unpack_from(block)
        if magic != MAGIC:
            raise Damaged("no superblock")
        if version != VERSION:
            raise Damaged(f"version {version}, this is {VERSION}")
        fields, said = block[: _SUPERBLOCK.size], block[_SUPERBLOCK.size : _SUPERBLOCK.size + CHECKSUM_BYTES]
        if said != checksum(XXH3, fields):
            raise Damaged("the superblock's checksum is wrong")
        if state != _READY:
            raise Damaged("its making came to no end")
        layout = Layout(slot_bytes, slots)
        if layout.digest != digest:
            raise Damaged("its layout is another one")
        return cls(layout, store_id, created_at)
