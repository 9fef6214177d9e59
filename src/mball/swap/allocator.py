"""Which slots are free: pure. Images take long runs, blocks the gaps between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from mball.swap.place import Extent


class Allocator:
    """Free slots as runs, in order and never touching each other."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._runs: list[Extent] = [Extent(0, slots)] if slots else []
        self.free = slots

    @property
    def runs(self) -> tuple[Extent, ...]:
        return tuple(self._runs)

    def take(self, count: int) -> tuple[Extent, ...] | None:
        """So many slots: one run that is long enough, the shortest of those; else the longest runs there are.

        None where fewer are free. A single slot comes from the first run, which leaves the long ones behind whole.
        """
        if not 0 < count <= self.free:
            return None
        if count == 1:
            return (self._cut(0, 1),)
        fitting = min((run for run in self._runs if run.slots >= count), key=lambda run: run.slots, default=None)
        if fitting is not None:
            return (self._cut(bisect_left(self._runs, fitting), count),)
        taken: list[Extent] = []
        for run in sorted(self._runs, key=lambda run: -run.slots):
            taken.append(self._cut(bisect_left(self._runs, run), min(run.slots, count)))
            count -= taken[-1].slots
            if count == 0:
                break
        return tuple(sorted(taken))

    def give(self, extents: Iterable[Extent]) -> None:
        """Slots that are used no more. Raises ValueError where one is free already, or not of this store."""
        for extent in extents:
            self._insert(extent)

    def reserve(self, extents: Iterable[Extent]) -> None:
        """Take these very slots. Raises ValueError where one is not free."""
        for extent in extents:
            first, count = extent
            # The last run that begins at or before the extent.
            at = bisect_left(self._runs, Extent(first + 1, 0)) - 1
            run = self._runs[at] if at >= 0 else Extent(0, 0)
            if count < 1 or run.first + run.slots < first + count or run.first > first:
                raise ValueError(f"slots {first} to {first + count - 1} are not free")
            before, after = Extent(run.first, first - run.first), first + count
            rest = Extent(after, run.first + run.slots - after)
            self._runs[at : at + 1] = [part for part in (before, rest) if part.slots]
            self.free -= count

    def _cut(self, at: int, count: int) -> Extent:
        first, there = self._runs[at]
        if count == there:
            del self._runs[at]
        else:
            self._runs[at] = Extent(first + count, there - count)
        self.free -= count
        return Extent(first, count)

    def _insert(self, extent: Extent) -> None:
        first, count = extent
        at = bisect_left(self._runs, extent)
        before = self._runs[at - 1] if at > 0 else None
        after = self._runs[at] if at < len(self._runs) else None
        if (
            count < 1
            or first < 0
            or first + count > self.slots
            or (before is not None and before.first + before.slots > first)
            or (after is not None and first + count > after.first)
        ):
            raise ValueError(f"slots {first} to {first + count - 1} are free already, or not there")
        begin, end = first, first + count
        low = high = at
        if before is not None and before.first + before.slots == begin:
            begin, low = before.first, at - 1
        if after is not None and after.first == end:
            end, high = after.first + after.slots, at + 1
        self._runs[low:high] = [Extent(begin, end - begin)]
        self.free += count
