"""The book against what it promises: a slot has one user, and none that the disk's index names is given away."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mball.errors import SwapMiss, SwapRefused
from mball.swap.book import Book, Want
from mball.swap.budget import Budget
from mball.swap.index import Kind, Snapshot
from mball.swap.layout import BLOCK_BYTES, Layout
from mball.swap.place import Extent, digest

LAYOUT = Layout(BLOCK_BYTES, 24)
MODEL = digest("m")
NAMES = st.integers(0, 11)


def key(name: int) -> bytes:
    return digest("key", str(name))


def slots_of(extents: tuple[Extent, ...] | list[Extent]) -> set[int]:
    return {first + at for first, count in extents for at in range(count)}


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.book = Book(LAYOUT, Budget(None), 1)
        self.leases: list[tuple[str, int]] = []
        self.durable = Snapshot(0, 1, 0, 0, [])
        self.captured: tuple[Snapshot, list[Extent]] | None = None
        self.generations: set[int] = set()
        self.now = 1e9

    @rule(
        name=NAMES,
        slots=st.integers(1, 8),
        parent=st.none() | NAMES,
        owner=st.sampled_from(["a", "b"]),
        saved_s=st.floats(0.1, 100),
    )
    def write(self, name: int, slots: int, parent: int | None, owner: str, saved_s: float) -> None:
        self.now += 1
        above = None if parent is None else key(parent)
        want = Want(Kind.BLOCK, key(name), MODEL, slots * BLOCK_BYTES, saved_s, parent=above)
        try:
            if not self.book.admit(want, self.now):
                assert self.book.entries[want.key].place.nbytes == want.nbytes
                return
            self.book.make_room(want, self.now)
            lease = self.book.lease(owner, want, self.now)
        except SwapRefused:
            return
        if lease is None:
            assert self.book.quarantined_slots > 0, "after a snapshot there will be room"
            return
        named = {slot for entry in self.durable.entries for slot in slots_of(entry.place.extents)}
        assert not slots_of(lease.place.extents) & named, "the disk's index names a slot that is to be written"
        assert lease.id not in self.generations
        self.generations.add(lease.id)
        self.leases.append((owner, lease.id))

    @rule(data=st.data(), how=st.sampled_from(["commit", "abandon", "another's"]))
    def end(self, data: st.DataObject, how: str) -> None:
        if not self.leases:
            return
        number = data.draw(st.integers(0, len(self.leases) - 1))
        owner, lease_id = self.leases[number]
        if how == "another's":
            assert self.book.commit("nobody", lease_id) is None
            assert not self.book.abandon("nobody", lease_id)
            return
        self.leases.pop(number)
        assert self.book.commit(owner, lease_id) if how == "commit" else self.book.abandon(owner, lease_id)
        assert self.book.commit(owner, lease_id) is None, "a lease ends once"

    @rule(owner=st.sampled_from(["a", "b"]))
    def die(self, owner: str) -> None:
        assert self.book.release(owner) == sum(one == owner for one, _ in self.leases)
        self.leases = [lease for lease in self.leases if lease[0] != owner]

    @rule(name=NAMES)
    def drop(self, name: int) -> None:
        self.book.drop(key(name))

    @rule(name=NAMES)
    def find(self, name: int) -> None:
        if key(name) in self.book.entries:
            assert self.book.find(key(name), MODEL, self.now).place.key == key(name)
            with pytest.raises(SwapMiss):
                self.book.find(key(name), digest("another model"), self.now)
        else:
            with pytest.raises(SwapMiss):
                self.book.find(key(name), MODEL, self.now)

    @rule()
    def capture(self) -> None:
        if self.captured is None:
            self.captured = self.book.capture(0, self.now)
            assert self.captured[0].generation > self.durable.generation

    @rule(works=st.booleans())
    def settle(self, works: bool) -> None:
        if self.captured is not None:
            snapshot, freed = self.captured
            self.captured = None
            if works:
                self.durable = snapshot
                self.book.settle(snapshot, freed)
            else:
                self.book.unsettle(freed)

    @rule()
    def reopen(self) -> None:
        """As after a crash: only what is durable comes back."""
        book = Book(LAYOUT, Budget(None), self.book.next_generation)
        book.resume(self.durable)
        assert {entry.place for entry in book.entries.values()} == {entry.place for entry in self.durable.entries}
        self.book, self.leases, self.captured = book, [], None

    @invariant()
    def every_slot_is_somewhere(self) -> None:
        book = self.book
        used = [slots_of(entry.place.extents) for entry in book.entries.values()]
        union = set().union(*used)
        assert len(union) == sum(map(len, used)), "two entries share a slot"
        there = book.free_slots + book.leased_slots + book.quarantined_slots + len(union)
        assert there == LAYOUT.slots


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def put(book: Book, name: int, *, parent: int | None = None, saved_s: float = 1.0, slots: int = 1) -> None:
    above = None if parent is None else key(parent)
    want = Want(Kind.BLOCK, key(name), MODEL, slots * BLOCK_BYTES, saved_s, parent=above)
    assert book.admit(want, 1.0)
    book.make_room(want, 1.0)
    if (lease := book.lease("a", want, 1.0)) is None:
        book.settle(*book.capture(0, 1.0))
        lease = book.lease("a", want, 1.0)
    assert lease is not None
    assert book.commit("a", lease.id)


def test_the_suffix_goes_before_the_prefix() -> None:
    book = Book(Layout(BLOCK_BYTES, 4), Budget(None), 1)
    put(book, 0, saved_s=1.0)
    put(book, 1, parent=0, saved_s=5.0)
    put(book, 2, parent=1, saved_s=5.0)
    put(book, 3, saved_s=6.0)
    put(book, 4, saved_s=50.0)
    assert set(book.entries) == {key(n) for n in (0, 1, 3, 4)}


def test_a_new_suffix_never_evicts_its_own_prefix() -> None:
    book = Book(Layout(BLOCK_BYTES, 2), Budget(None), 1)
    put(book, 0, saved_s=1.0)
    put(book, 1, parent=0, saved_s=1.0)
    with pytest.raises(SwapRefused, match="worth more"):
        put(book, 2, parent=1, saved_s=100.0)


def test_what_is_read_stays() -> None:
    book = Book(Layout(BLOCK_BYTES, 2), Budget(None), 1)
    put(book, 0, saved_s=1.0)
    put(book, 1, saved_s=2.0)
    book.hold(key(0))
    book.hold(key(0))
    book.let_go(key(0))
    put(book, 2, saved_s=50.0)
    assert set(book.entries) == {key(0), key(2)}
    book.let_go(key(0))
    put(book, 3, saved_s=50.0)
    assert set(book.entries) == {key(2), key(3)}


def test_what_can_not_be_read_is_not_written_to_again() -> None:
    book = Book(Layout(BLOCK_BYTES, 2), Budget(None), 1)
    put(book, 0)
    assert book.drop(key(0), retire=True)
    assert (book.retired_slots, book.free_slots, book.quarantined_slots) == (1, 1, 0)


def test_snapshots_are_a_sixteenth_of_what_is_committed_at_most() -> None:
    book = Book(Layout(BLOCK_BYTES, 4000), Budget(None), 1)
    written = snapshots = 0
    for name in range(2000):
        put(book, name)
        written += book.written_bytes(BLOCK_BYTES)
        if book.snapshot_due:
            snapshots += book.snapshot_bytes
            book.settle(*book.capture(0, 1.0))
    assert 0 < snapshots <= written / 16
