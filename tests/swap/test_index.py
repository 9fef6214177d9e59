from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.swap.allocator import Allocator
from mball.swap.index import Entry, Kind, Snapshot, snapshot_bytes
from mball.swap.layout import BLOCK_BYTES, Damaged, Layout
from mball.swap.place import Place
from mball.swap.policy import Worth

LAYOUT = Layout(BLOCK_BYTES, 64)
STORE = bytes(range(16))

digests = st.binary(min_size=32, max_size=32)
floats = st.floats(0, 1e12)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    allocator = Allocator(LAYOUT.slots)
    entries = []
    for count in draw(st.lists(st.integers(1, 9), max_size=20)):
        extents = allocator.take(count)
        if extents is not None:
            place = Place(draw(digests), draw(digests), draw(st.integers(0, 1 << 63)), count * BLOCK_BYTES, extents)
            worth = Worth(draw(floats), draw(floats), draw(floats))
            entries.append(Entry(draw(st.sampled_from(Kind)), place, worth, draw(st.none() | digests.filter(any))))
    numbers = st.integers(0, 1 << 60)
    return Snapshot(draw(numbers), draw(numbers), draw(numbers), draw(numbers), entries)


@given(snapshots())
def test_a_snapshot_comes_back(snapshot: Snapshot) -> None:
    data = snapshot.encode(STORE)
    extents = sum(len(entry.place.extents) for entry in snapshot.entries)
    assert len(data) == snapshot_bytes(len(snapshot.entries), extents) <= LAYOUT.index_bytes
    assert Snapshot.decode(data, LAYOUT, STORE) == snapshot


@settings(max_examples=300)
@given(snapshots(), st.data())
def test_a_changed_byte_changes_nothing_that_is_read(snapshot: Snapshot, data: st.DataObject) -> None:
    encoded = bytearray(snapshot.encode(STORE))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        assert Snapshot.decode(bytes(encoded), LAYOUT, STORE) == snapshot
    except Damaged:
        pass
    else:
        extents = sum(len(entry.place.extents) for entry in snapshot.entries)
        assert at >= 128 + 144 * len(snapshot.entries) + 8 * extents, "only the padding behind may differ"


@given(snapshots(), st.data())
def test_a_torn_one_is_none(snapshot: Snapshot, data: st.DataObject) -> None:
    encoded = snapshot.encode(STORE)
    cut = data.draw(st.integers(0, len(encoded) // BLOCK_BYTES - 1)) * BLOCK_BYTES
    for torn in (encoded[:cut], encoded[:cut] + b"\xff" * (len(encoded) - cut)):
        with pytest.raises(Damaged):
            Snapshot.decode(torn, LAYOUT, STORE)


def test_another_stores_index_is_none() -> None:
    with pytest.raises(Damaged, match="another store"):
        Snapshot.decode(Snapshot(1, 1, 0, 0, []).encode(STORE), LAYOUT, bytes(16))


def test_every_slot_may_be_an_entry_of_its_own() -> None:
    allocator = Allocator(LAYOUT.slots)
    extents = [allocator.take(1) or () for _ in range(LAYOUT.slots)]
    entries = [Entry(Kind.BLOCK, Place(bytes(32), bytes(32), 1, 1, e), Worth(1, 1, 1)) for e in extents]
    assert len(Snapshot(1, 1, 0, 0, entries).encode(STORE)) <= LAYOUT.index_bytes
