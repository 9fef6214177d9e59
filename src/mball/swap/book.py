"""The store's state in memory: entries, leases, free slots, budget. No I/O, no lock: its owner has both.

A slot's life: free → leased → an entry's → quarantined (its entry is gone from memory, not yet from the disk) → free.
No slot that the newest snapshot on the disk names is ever written to: so that snapshot is true whenever it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mball.errors import SwapMiss, SwapRefused
from mball.swap.allocator import Allocator
from mball.swap.budget import Budget
from mball.swap.index import Entry, Kind, Snapshot, snapshot_bytes
from mball.swap.layout import BLOCK_BYTES, Layout, whole_blocks
from mball.swap.place import Extent, Place
from mball.swap.policy import Candidate, Worth, victims
from mball.units import MiB, format_bytes

_EVICTED_SHARE = 64
"""Room is made for so many-th of the store at a time: every making of room costs a snapshot."""
_SNAPSHOT_SHARE = 16
"""A snapshot is due once so many times its bytes were committed."""
_SNAPSHOT_LEAST_BYTES = 64 * MiB
"""Not before so much was: each snapshot waits for the disk twice."""
_SNAPSHOTS_AFTER = 4
"""Of the day's bytes so many snapshots are kept for those that a write brings with it."""


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be written. `key` and `model`: SHA-256s (`place.digest`). `saved_s`: what a hit saves; `rate`: uses a
    second as expected."""

    kind: Kind
    key: bytes
    model: bytes
    nbytes: int
    saved_s: float = 1.0
    rate: float = 1.0 / 3600
    parent: bytes | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one entry's slots. Its id is the place's generation."""

    owner: str
    entry: Entry

    @property
    def id(self) -> int:
        return self.entry.place.generation

    @property
    def place(self) -> Place:
        return self.entry.place

    def to_wire(self) -> dict[str, Any]:
        """As JSON; a worker needs the place alone."""
        return self.place.to_wire()


class Book:
    def __init__(self, layout: Layout, budget: Budget, next_generation: int) -> None:
        self.layout = layout
        self.budget = budget
        self.entries: dict[bytes, Entry] = {}
        self.generation = 0
        self.next_generation = next_generation
        self.uncommitted_bytes = 0
        """Committed since the last capture."""
        self.changed = False
        """Whether there are entries now that the last capture lacks, or the other way round."""
        self.used = False
        """Whether one was used since."""
        self.count: Counter[Kind] = Counter()
        """Entries by kind."""
        self.held_slots: Counter[Kind] = Counter()
        """Their slots."""
        self._allocator = Allocator(layout.slots)
        self._leases: dict[int, Lease] = {}
        self._leased_keys: set[bytes] = set()
        self._reading: dict[bytes, int] = {}
        self._quarantine: list[Extent] = []
        self._settling = 0
        self._retired = 0
        self._extents = 0

    def resume(self, snapshot: Snapshot) -> None:
        """Begin with what the disk has. Raises ValueError where two entries claim a slot, or it is not there."""
        self.generation = snapshot.generation
        self.next_generation = max(self.next_generation, snapshot.next_generation)
        self.budget.resume(snapshot.day, snapshot.written_bytes)
        for entry in snapshot.entries:
            if entry.place.slots != self.layout.slots_for(entry.place.nbytes):
                raise ValueError(f"an entry of {entry.place.nbytes} bytes in {entry.place.slots} slots")
            self._allocator.reserve(entry.place.extents)
            self._add(entry)
        self.changed = False

    @property
    def free_slots(self) -> int:
        return self._allocator.free

    @property
    def quarantined_slots(self) -> int:
        """Free after the next snapshot, or the one that is being written."""
        return _count(self._quarantine) + self._settling

    @property
    def leased_slots(self) -> int:
        return sum(lease.place.slots for lease in self._leases.values())

    @property
    def retired_slots(self) -> int:
        return self._retired

    @property
    def snapshot_bytes(self) -> int:
        return snapshot_bytes(len(self.entries), self._extents)

    @property
    def snapshot_due(self) -> bool:
        least_bytes = min(_SNAPSHOT_LEAST_BYTES, self.layout.total_bytes // _EVICTED_SHARE)
        return self.uncommitted_bytes >= max(least_bytes, _SNAPSHOT_SHARE * self.snapshot_bytes)

    def written_bytes(self, nbytes: int) -> int:
        """What an entry costs the disk: its header blocks, and whole blocks of payload."""
        return self.layout.slots_for(nbytes) * BLOCK_BYTES + whole_blocks(nbytes)

    def find(self, key: bytes, model: bytes, now_s: float) -> Entry:
        """An entry that is used now. Raises SwapMiss."""
        entry = self.entries.get(key)
        if entry is None or entry.place.model != model:
            raise SwapMiss("absent", "it is not in the store")
        self.entries[key] = found = replace(entry, worth=entry.worth.used(now_s))
        self.used = True
        return found

    def value(self, key: bytes, worth: Worth) -> None:
        """Set what an entry is worth, where it is there."""
        if (entry := self.entries.get(key)) is not None:
            self.entries[key] = replace(entry, worth=worth)
            self.used = True

    def hold(self, key: bytes) -> None:
        """Keep it from being evicted, until as many `let_go`."""
        self._reading[key] = self._reading.get(key, 0) + 1

    def let_go(self, key: bytes) -> None:
        if self._reading.get(key, 0) <= 1:
            self._reading.pop(key, None)
        else:
            self._reading[key] -= 1

    def admit(self, want: Want, now_s: float) -> bool:
        """Whether it is to be written: False where it is there already. Raises SwapRefused."""
        there = self.entries.get(want.key)
        if there is not None and there.place.model == want.model and there.place.nbytes == want.nbytes:
            return False
        if there is not None:
            self.drop(want.key)
        if want.key in self._leased_keys:
            raise SwapRefused("busy", "it is being written by another")
        if not 0 < want.nbytes <= self.layout.slots * self.layout.slot_bytes:
            whole = format_bytes(self.layout.slots * self.layout.slot_bytes)
            raise SwapRefused("full", f"{format_bytes(want.nbytes)} wanted, the store has {whole} in all")
        cost = self.written_bytes(want.nbytes) + _SNAPSHOTS_AFTER * self.snapshot_bytes
        if not self.budget.admits(cost, now_s):
            left = max(0, (self.budget.limit_bytes or 0) - self.budget.used_bytes)
            raise SwapRefused("budget", f"{format_bytes(cost)} wanted, {format_bytes(left)} of the day's are left")
        return True

    def make_room(self, want: Want, now_s: float) -> int:
        """Evicts until there will be room after the next snapshot; how many went. Raises SwapRefused where what would
        have to go is worth as much or more."""
        needed = self.layout.slots_for(want.nbytes)
        short = needed - self._allocator.free - self.quarantined_slots
        if short <= 0:
            return 0
        score = Worth.of(want.saved_s, want.rate, now_s).score(self.written_bytes(want.nbytes))
        batch = max(short, self.layout.slots // _EVICTED_SHARE)
        chosen = victims(
            map(self._candidate, self.entries.values()),
            short,
            wanted=batch,
            below=score,
            kept={*self._reading, *self._ancestors(want.parent)},
        )
        if chosen is None:
            raise SwapRefused("full", f"{format_bytes(want.nbytes)} wanted, and what is there is worth more")
        for key in chosen:
            self.drop(key)
        return len(chosen)

    def lease(self, owner: str, want: Want, now_s: float) -> Lease | None:
        """Slots for one entry, charged to the budget; None where a snapshot must come first: slots are free only after
        it, or the budget's promise is used up."""
        cost = self.written_bytes(want.nbytes)
        if not self.budget.promised(cost):
            return None
        extents = self._allocator.take(self.layout.slots_for(want.nbytes))
        if extents is None:
            return None
        self.budget.charge(cost, now_s)
        place = Place(want.key, want.model, self.next_generation, want.nbytes, extents)
        self.next_generation += 1
        worth = Worth.of(want.saved_s, want.rate, now_s)
        lease = Lease(owner, Entry(want.kind, place, worth, want.parent))
        self._leases[lease.id] = lease
        self._leased_keys.add(want.key)
        return lease

    def commit(self, owner: str, lease_id: int) -> Entry | None:
        """The lease's slots are written: they are an entry now. None where the owner has no such lease (any more)."""
        lease = self._end(owner, lease_id)
        if lease is None:
            return None
        self._add(lease.entry)
        self.uncommitted_bytes += self.written_bytes(lease.place.nbytes)
        return lease.entry

    def abandon(self, owner: str, lease_id: int) -> bool:
        """The lease's slots are free again: nothing on the disk names them."""
        lease = self._end(owner, lease_id)
        if lease is not None:
            self._allocator.give(lease.place.extents)
        return lease is not None

    def release(self, owner: str) -> int:
        """Abandons all leases of an owner whose process has ended; their number."""
        ids = [lease.id for lease in self._leases.values() if lease.owner == owner]
        return sum(self.abandon(owner, lease_id) for lease_id in ids)

    def drop(self, key: bytes, *, generation: int | None = None, retire: bool = False) -> bool:
        """Forget an entry, where it is (still) that of this generation. `retire`: its slots can't be read, and are used
        no more while this store is open."""
        entry = self.entries.get(key)
        if entry is None or generation not in (None, entry.place.generation):
            return False
        del self.entries[key]
        self.count[entry.kind] -= 1
        self.held_slots[entry.kind] -= entry.place.slots
        self.changed = True
        self._extents -= len(entry.place.extents)
        if retire:
            self._retired += entry.place.slots
        else:
            self._quarantine += entry.place.extents
        return True

    def capture(self, ahead_bytes: int, now_s: float, *, last: bool = False) -> tuple[Snapshot, list[Extent]]:
        """What to write now, and the slots that are free once it is on the disk (`settle`). Charges the writing.

        It promises `ahead_bytes` of the day's budget; the `last` one says what was written, and no more.
        """
        self.generation += 1
        self.budget.charge(self.snapshot_bytes, now_s)
        snapshot = Snapshot(
            self.generation,
            self.next_generation,
            self.budget.day,
            self.budget.used_bytes if last else self.budget.ahead(ahead_bytes),
            list(self.entries.values()),
        )
        freed, self._quarantine = self._quarantine, []
        self._settling += _count(freed)
        self.uncommitted_bytes, self.changed, self.used = 0, False, False
        return snapshot, freed

    def settle(self, snapshot: Snapshot, freed: list[Extent]) -> None:
        """That snapshot is on the disk."""
        self.budget.promised_bytes = snapshot.written_bytes if snapshot.day == self.budget.day else 0
        self._settling -= _count(freed)
        self._allocator.give(freed)

    def unsettle(self, freed: list[Extent]) -> None:
        """It may not be: the slots stay as they are."""
        self._settling -= _count(freed)
        self._quarantine += freed
        self.changed = True

    def _add(self, entry: Entry) -> None:
        self.entries[entry.place.key] = entry
        self.count[entry.kind] += 1
        self.held_slots[entry.kind] += entry.place.slots
        self.changed = True
        self._extents += len(entry.place.extents)

    def _end(self, owner: str, lease_id: int) -> Lease | None:
        lease = self._leases.get(lease_id)
        if lease is None or lease.owner != owner:
            return None
        del self._leases[lease_id]
        self._leased_keys.discard(lease.place.key)
        return lease

    def _candidate(self, entry: Entry) -> Candidate:
        place = entry.place
        return Candidate(place.key, entry.parent, place.slots, entry.worth.score(self.written_bytes(place.nbytes)))

    def _ancestors(self, key: bytes | None) -> set[bytes]:
        """Of a new entry: evicted, they would make it worthless."""
        found: set[bytes] = set()
        while key is not None and key not in found and (entry := self.entries.get(key)) is not None:
            found.add(key)
            key = entry.parent
        return found


def _count(extents: Iterable[Extent]) -> int:
    return sum(extent.slots for extent in extents)
