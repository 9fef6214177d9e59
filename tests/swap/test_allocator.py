from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mball.swap.allocator import Allocator
from mball.swap.place import Extent

SLOTS = 60


class Model(RuleBasedStateMachine):
    """Against a set of free slots."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(SLOTS)
        self.free = set(range(SLOTS))
        self.taken: list[tuple[Extent, ...]] = []

    @rule(count=st.integers(1, SLOTS))
    def take(self, count: int) -> None:
        extents = self.allocator.take(count)
        assert (extents is None) == (count > len(self.free))
        if extents is None:
            return
        slots = [first + at for first, length in extents for at in range(length)]
        assert len(slots) == count == len(set(slots))
        assert set(slots) <= self.free
        assert list(extents) == sorted(extents)
        longest = max(self.runs(), default=0)
        assert len(extents) == 1 or longest < count
        self.free -= set(slots)
        self.taken.append(extents)

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        if self.taken:
            extents = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
            self.allocator.give(extents)
            self.free |= {first + at for first, length in extents for at in range(length)}

    @rule(first=st.integers(0, SLOTS - 1), count=st.integers(1, 10))
    def reserve(self, first: int, count: int) -> None:
        wanted = set(range(first, first + count))
        if wanted <= self.free:
            self.allocator.reserve([Extent(first, count)])
            self.free -= wanted
            self.taken.append((Extent(first, count),))
        else:
            with pytest.raises(ValueError, match="not free"):
                self.allocator.reserve([Extent(first, count)])

    @rule(first=st.integers(-3, SLOTS + 3), count=st.integers(0, 10))
    def give_what_is_free(self, first: int, count: int) -> None:
        there = set(range(first, first + count))
        if count == 0 or there & self.free or first < 0 or first + count > SLOTS:
            with pytest.raises(ValueError, match="free already, or not there"):
                self.allocator.give([Extent(first, count)])

    @invariant()
    def agrees(self) -> None:
        runs = self.allocator.runs
        assert {first + at for first, count in runs for at in range(count)} == self.free
        assert self.allocator.free == len(self.free)
        assert all(a.first + a.slots < b.first for a, b in pairwise(runs))

    def runs(self) -> list[int]:
        lengths, at = [], 0
        while at < SLOTS:
            begin = at
            while at < SLOTS and at in self.free:
                at += 1
            if at > begin:
                lengths.append(at - begin)
            at += 1
        return lengths


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(st.integers(1, 20))
def test_single_slots_leave_long_runs_whole(count: int) -> None:
    allocator = Allocator(100)
    allocator.reserve([Extent(30, 1)])
    for _ in range(count):
        allocator.take(1)
    assert allocator.runs[-1] == Extent(31, 69)
