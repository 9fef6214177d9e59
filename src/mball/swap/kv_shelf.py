"""Which place holds which block of KV, and who goes first: pure, no lock.

A block is worth nothing without those that it continues, so one goes never before those that continue it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mball.swap.policy import Worth

_STALE = 64
"""The heap is made anew once so many more than twice the entries are in it."""


@dataclass(slots=True)
class Held:
    """A block: its key, the place it is at, the key of what it continues, and how many come before it. A pinned one
    stays."""

    key: bytes
    place: int
    parent: bytes | None
    depth: int
    worth: Worth
    nbytes: int = 1
    pins: int = 0

    @property
    def score(self) -> float:
        return self.worth.score(self.nbytes)


class Shelf:
    def __init__(self) -> None:
        self._held: dict[bytes, Held] = {}
        self._children: dict[bytes, int] = {}
        self._leaves: list[tuple[float, bytes]] = []
        self.num_unpinned = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(self._held.values())

    def get(self, key: bytes) -> Held | None:
        return self._held.get(key)

    def chain(self, keys: Iterable[bytes]) -> list[Held]:
        """The first of these that are there, up to the first that is not."""
        found = []
        for key in keys:
            held = self._held.get(key)
            if held is None:
                break
            found.append(held)
        return found

    def add(self, held: Held) -> None:
        """Raises ValueError where its key is there."""
        if held.key in self._held:
            raise ValueError("a block of KV is there already")
        self._held[held.key] = held
        if held.parent is not None:
            self._children[held.parent] = self._children.get(held.parent, 0) + 1
        self.num_unpinned += held.pins == 0
        self._offer(held)

    def remove(self, held: Held) -> None:
        del self._held[held.key]
        self.num_unpinned -= held.pins == 0
        if held.parent is not None:
            self._children[held.parent] -= 1
            if self._children[held.parent] == 0:
                del self._children[held.parent]
                if (parent := self._held.get(held.parent)) is not None:
                    self._offer(parent)

    def is_leaf(self, held: Held) -> bool:
        """Nothing that is here continues it."""
        return held.key not in self._children

    def pin(self, held: Held) -> None:
        self.num_unpinned -= held.pins == 0
        held.pins += 1

    def unpin(self, held: Held) -> None:
        held.pins -= 1
        self.num_unpinned += held.pins == 0
        self._offer(held)

    def use(self, held: Held, now_s: float) -> None:
        """One more use."""
        held.worth = held.worth.used(now_s)
        self._offer(held)

    def pop(self, below: float = math.inf) -> Held | None:
        """Removes the least valuable that may go; None where there is none of a score below that."""
        while self._leaves:
            score, key = self._leaves[0]
            held = self._held.get(key)
            if held is None or held.score != score or not self._may_go(held):
                heapq.heappop(self._leaves)
                continue
            if score >= below:
                return None
            heapq.heappop(self._leaves)
            self.remove(held)
            return held
        return None

    def clear(self) -> None:
        self._held.clear()
        self._children.clear()
        self._leaves.clear()
        self.num_unpinned = 0

    def _may_go(self, held: Held) -> bool:
        return held.pins == 0 and held.key not in self._children

    def _offer(self, held: Held) -> None:
        if not self._may_go(held):
            return
        heapq.heappush(self._leaves, (held.score, held.key))
        if len(self._leaves) > 2 * len(self._held) + _STALE:
            self._leaves = [(held.score, held.key) for held in self._held.values() if self._may_go(held)]
            heapq.heapify(self._leaves)
