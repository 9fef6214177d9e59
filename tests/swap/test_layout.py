from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.errors import ConfigError
from mball.swap.layout import BLOCK_BYTES, HOLDER_AT, Damaged, Layout, Superblock
from mball.units import GiB, MiB, TiB

slot_sizes = st.integers(1, 2048).map(lambda blocks: blocks * BLOCK_BYTES)


@given(st.integers(16 * MiB, 16 * TiB), slot_sizes)
def test_a_layout_fills_its_size_with_areas_that_do_not_touch(size: int, slot_bytes: int) -> None:
    layout = Layout.of_size(size, slot_bytes)
    begins = [0, HOLDER_AT, layout.index_at(0), layout.index_at(1), layout.slot_at(0), layout.total_bytes]
    assert all(at % BLOCK_BYTES == 0 for at in begins)
    assert begins == sorted(set(begins))
    assert layout.index_at(1) - layout.index_at(0) == layout.index_bytes == layout.slot_at(0) - layout.index_at(1)
    assert layout.total_bytes <= size
    assert Layout(slot_bytes, layout.slots + 2).total_bytes > size


@given(st.integers(1, 1 << 20), slot_sizes, st.binary(min_size=16, max_size=16))
def test_a_superblock_comes_back_and_any_flipped_byte_is_found(slots: int, slot_bytes: int, store_id: bytes) -> None:
    superblock = Superblock(Layout(slot_bytes, slots), store_id, 1.5)
    block = superblock.encode()
    assert len(block) == BLOCK_BYTES
    assert Superblock.decode(block) == superblock
    for at in range(100):
        with pytest.raises(Damaged):
            Superblock.decode(block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :])


def test_a_store_that_is_being_made_holds_nothing() -> None:
    with pytest.raises(Damaged, match="no end"):
        Superblock.decode(Superblock(Layout(2 * MiB, 5), bytes(16), 0.0).encode(ready=False))


def test_every_number_of_a_layout_is_in_its_digest() -> None:
    layout = Layout.of_size(GiB)
    assert layout.digest != dataclasses.replace(layout, slots=layout.slots - 1).digest
    assert layout.digest != dataclasses.replace(layout, slot_bytes=MiB).digest


@pytest.mark.parametrize("slot_bytes", [0, 4095, 6 * 1024, 2 * GiB])
def test_a_slot_is_whole_blocks(slot_bytes: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 4 KiB"):
        Layout.of_size(GiB, slot_bytes)


def test_too_small_for_one_slot() -> None:
    with pytest.raises(ConfigError, match="no room for a slot"):
        Layout.of_size(MiB)
