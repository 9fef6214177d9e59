"""What an entry is worth, and which go for a new one: pure.

The value is saved seconds × rate of use ÷ bytes. A rate fades by half in HALF_LIFE_S without use, every entry's alike:
so the order of two entries never changes by waiting, and the value's logarithm at the time 0 orders them for good.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

HALF_LIFE_S = 3600.0
_PER_S = math.log(2) / HALF_LIFE_S


@dataclass(frozen=True, slots=True)
class Worth:
    """`saved_s` is what one use saves. `heat` counts uses, those before `at_s` (since 1970) faded to that time."""

    saved_s: float
    heat: float
    at_s: float

    @classmethod
    def of(cls, saved_s: float, rate: float, at_s: float) -> Worth:
        """`rate` in uses a second."""
        return cls(saved_s, rate / _PER_S, at_s)

    def rate(self, now_s: float) -> float:
        """Uses a second."""
        return self._faded(now_s) * _PER_S

    def used(self, now_s: float) -> Worth:
        """After one more use. A clock that was set back makes nothing hotter."""
        return Worth(self.saved_s, self._faded(now_s) + 1.0, max(now_s, self.at_s))

    def score(self, nbytes: int) -> float:
        """Orders by value: log2 of it at the time 0."""
        product = self.saved_s * self.heat / nbytes
        return math.log2(product) + self.at_s / HALF_LIFE_S if product > 0 else -math.inf

    def _faded(self, now_s: float) -> float:
        return self.heat * math.exp2(-max(0.0, now_s - self.at_s) / HALF_LIFE_S)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One that may go. `parent` is the key of what it continues: it is worth nothing without."""

    key: bytes
    parent: bytes | None
    slots: int
    score: float


def victims(
    candidates: Iterable[Candidate],
    needed: int,
    *,
    wanted: int | None = None,
    below: float = math.inf,
    kept: Collection[bytes] = (),
) -> list[bytes] | None:
    """Keys that free `needed` slots, in the order to drop them: the lowest score first, a child before its parent.

    None where only those of a score of `below` or more, those `kept`, and their parents are left. Goes on to `wanted`
    slots while such are there.
    """
    by_key = {candidate.key: candidate for candidate in candidates}
    children = dict.fromkeys(by_key, 0)
    for candidate in by_key.values():
        if candidate.parent in children:
            children[candidate.parent] += 1
    leaves = [(by_key[key].score, key) for key, count in children.items() if count == 0 and key not in kept]
    heapq.heapify(leaves)
    chosen: list[bytes] = []
    freed, goal = 0, max(needed, wanted or 0)
    while leaves and freed < goal:
        score, key = heapq.heappop(leaves)
        if score >= below:
            break
        candidate = by_key[key]
        chosen.append(key)
        freed += candidate.slots
        parent = candidate.parent
        if parent in children:
            children[parent] -= 1
            if children[parent] == 0 and parent not in kept:
                heapq.heappush(leaves, (by_key[parent].score, parent))
    return chosen if freed >= needed else None
