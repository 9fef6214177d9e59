"""Bytes that change on the disk: none is served."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from mball.errors import SwapMiss
from mball.swap.check import check
from mball.swap.disk import aligned, reopened
from mball.swap.layout import BLOCK_BYTES, HOLDER_AT, Damaged
from mball.swap.opening import read_superblock
from mball.swap.place import HEADER_BYTES
from mball.swap.snapshots import Snapshots
from tests.swap.stores import MODEL, SLOT, block, content, get, image, open_at

FLIPS_IN_SLOTS = 10_000
FLIPS_IN_TABLES = 2_000


def filled(path: Path) -> dict[bytes, bytes]:
    store = open_at(path)
    wants = [image("a", 7 * SLOT - 555), image("b", SLOT + 1), *(block(str(number)) for number in range(9))]
    for number, want in enumerate(wants):
        store.put(want, content(str(number), want.nbytes))
    store.close()
    return {want.key: bytes(content(str(number), want.nbytes)) for number, want in enumerate(wants)}


def flip(fd: int, at: int, draw: random.Random) -> bytes:
    before = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([before[0] ^ draw.randrange(1, 256)]), at)
    return before


def test_ten_thousand_flipped_bytes_in_slots(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    expected = filled(path)
    store = open_at(path)
    fd = os.open(path, os.O_RDWR)
    draw = random.Random(0)
    places = {}
    for key in expected:
        place = store.find(key, MODEL)
        for run in place.runs(0, place.slots, 1):
            places[run.slot] = (place, run)
    memory = aligned(SLOT)
    padding, reasons = 0, Counter[str]()
    for _ in range(FLIPS_IN_SLOTS):
        slot = draw.choice(list(places))
        place, run = places[slot]
        payload = place.payload_bytes(run.ordinal, store.layout)
        # Headers are a small part of a slot, and more can go wrong there.
        inside = draw.randrange(HEADER_BYTES if draw.random() < 0.3 else store.layout.stride_bytes)
        at = store.layout.slot_at(slot) + inside
        before = flip(fd, at, draw)
        try:
            store.slots.read_run(place, run, memory[:payload], run.ordinal * SLOT)
            assert memory[:payload] == expected[place.key][run.ordinal * SLOT :][:payload]
            assert HEADER_BYTES <= inside < BLOCK_BYTES or inside >= BLOCK_BYTES + payload
            padding += 1
        except SwapMiss as miss:
            reasons[miss.reason] += 1
        os.pwrite(fd, before, at)
    assert reasons.keys() <= {"checksum", "stale"}
    assert reasons.total() + padding == FLIPS_IN_SLOTS
    assert reasons.total() > FLIPS_IN_SLOTS / 2
    os.close(fd)
    store.close()
    assert check(path).whole


def test_flipped_bytes_in_superblock_and_index(tmp_path: Path) -> None:
    """Either copy is enough; what a flip makes of an index is never believed."""
    path = tmp_path / "swap"
    filled(path)
    draw = random.Random(1)
    fd = os.open(path, os.O_RDWR)
    disk = reopened(fd)
    superblock = read_superblock(disk)
    assert superblock is not None
    good = [Snapshots(disk, superblock).read(area) for area in range(2)]
    for _ in range(FLIPS_IN_TABLES):
        at = draw.randrange(superblock.layout.slot_at(0))
        before = flip(fd, at, draw)
        assert read_superblock(disk) == superblock
        snapshots = Snapshots(disk, superblock)
        for area in range(2):
            try:
                assert snapshots.read(area) == good[area]
            except Damaged:
                assert 0 <= at - superblock.layout.index_at(area) < superblock.layout.index_bytes
        newest, _ = snapshots.load()
        assert newest in good
        os.pwrite(fd, before, at)
    disk.close()
    os.close(fd)
    assert superblock.layout.index_at(0) > HOLDER_AT


def test_a_damaged_entry_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    expected = filled(path)
    store = open_at(path)
    place = store.find(image("a", 1).key, MODEL)
    fd = os.open(path, os.O_RDWR)
    flip(fd, store.layout.slot_at(place.extents[0].first + 3) + BLOCK_BYTES + 77, random.Random(2))
    os.close(fd)
    want = image("a", 7 * SLOT - 555)
    with pytest.raises(SwapMiss, match="checksum"):
        get(store, want)
    assert store.counters["misses:checksum"] == 1
    with pytest.raises(SwapMiss, match="absent"):
        get(store, want)
    assert get(store, block("3")) == expected[block("3").key]
    assert store.put(want, content("0", want.nbytes)) > 0
    assert get(store, want) == expected[want.key]
    store.close()


def test_slots_that_changed_places_are_seen(tmp_path: Path) -> None:
    """Each has a right checksum, and is not what is looked for."""
    path = tmp_path / "swap"
    filled(path)
    store = open_at(path)
    first = store.find(image("a", 1).key, MODEL).extents[0].first
    stride = store.layout.stride_bytes
    fd = os.open(path, os.O_RDWR)
    one, other = (os.pread(fd, stride, store.layout.slot_at(first + n)) for n in (1, 2))
    os.pwrite(fd, one, store.layout.slot_at(first + 2))
    os.pwrite(fd, other, store.layout.slot_at(first + 1))
    os.close(fd)
    with pytest.raises(SwapMiss, match="stale"):
        get(store, image("a", 7 * SLOT - 555))
    store.close()


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_index(tmp_path: Path, both: bool) -> None:
    path = tmp_path / "swap"
    filled(path)
    store = open_at(path)
    layout = store.layout
    store.close()
    with path.open("r+b") as file:
        for area in (0, 1) if both else (0,):
            file.seek(layout.index_at(area) + 40)
            file.write(b"torn")
    store = open_at(path)
    assert store.counters["index_damaged"] == 1 + both
    there = [name for name in range(9) if store.has(block(str(name)).key, MODEL)]
    assert (there == []) == both
    assert store.put(image("new", 3 * SLOT), content("new", 3 * SLOT)) > 0
    store.close()
    store = open_at(path)
    assert get(store, image("new", 3 * SLOT)) == content("new", 3 * SLOT)
    store.close()
