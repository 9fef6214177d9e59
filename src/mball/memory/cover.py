"""The cheapest way to free so many bytes, taking at most one offer from each. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

T = TypeVar("T")

GOOD_ENOUGH = 1.05
"""A choice is not searched for further once it costs at most so many times what the bound allows."""

SEARCH_STEPS = 100_000
"""Choices looked at, times the number of those that offer: what keeps 200 models within milliseconds."""


@dataclass(frozen=True, slots=True)
class Offer(Generic[T]):
    """`nbytes` for `cost`, both above zero. `what` is the caller's."""

    nbytes: int
    cost: float
    what: T

    @property
    def score(self) -> float:
        return self.cost / self.nbytes


Group = Sequence[Offer[T]]
"""What one model offers, of which one at most is taken."""


def cover(groups: Sequence[Group[T]], lacking: int) -> list[Offer[T]] | None:
    """Offers that free `lacking` bytes, none of which can be left out; None where all together do not.

    By rising cost a byte first; then, where the bound says that it may be much dearer than need be, a depth-first
    search with a limit on its steps, which is exact to `GOOD_ENOUGH` on small cases. Equal ones keep the order given.
    """
    if lacking <= 0:
        return []
    ordered = sorted((group for group in groups if group), key=lambda group: min(offer.score for offer in group))
    if sum(max(offer.nbytes for offer in group) for group in ordered) < lacking:
        return None
    search = _Search(ordered)
    best = _trimmed(_greedy(ordered, lacking), groups, lacking)
    if _cost(best) <= GOOD_ENOUGH * search.bound(0, lacking):
        return best
    return _trimmed(search.run(best, lacking), groups, lacking)


class _Search(Generic[T]):
    """Depth first over the groups by rising score; `steps` are left."""

    def __init__(self, groups: Sequence[Group[T]]) -> None:
        self._groups = groups
        # The bound: each gives its most at its best score, the last of them in part.
        self._scores = [min(offer.score for offer in group) for group in groups]
        most = [max(offer.nbytes for offer in group) for group in groups]
        self._bytes = [0, *accumulate(most)]
        self._costs = [0.0, *accumulate(nbytes * score for nbytes, score in zip(most, self._scores, strict=True))]
        self._steps = SEARCH_STEPS // max(1, len(groups))

    def bound(self, first: int, lacking: int) -> float:
        """No choice among the groups from `first` on is cheaper."""
        if lacking <= 0:
            return 0.0
        wanted = self._bytes[first] + lacking
        whole = bisect_left(self._bytes, wanted) - 1
        if whole >= len(self._scores):
            return float("inf")
        return self._costs[whole] - self._costs[first] + (wanted - self._bytes[whole]) * self._scores[whole]

    def run(self, best: list[Offer[T]], lacking: int) -> list[Offer[T]]:
        """The cheapest found, `best` where none is cheaper."""
        best_cost = _cost(best)
        # Last in, first out: what was chosen so far, its cost, the next group, what is still lacking.
        todo: list[tuple[tuple[Offer[T], ...], float, int, int]] = [((), 0.0, 0, lacking)]
        while todo and self._steps > 0:
            self._steps -= 1
            chosen, cost, group, left = todo.pop()
            if left <= 0:
                if cost < best_cost:
                    best, best_cost = list(chosen), cost
                continue
            if (cost + self.bound(group, left)) * GOOD_ENOUGH > best_cost:
                continue
            todo.append((chosen, cost, group + 1, left))
            for offer in self._groups[group]:
                todo.append(((*chosen, offer), cost + offer.cost, group + 1, left - offer.nbytes))
        return best


def _greedy(groups: Sequence[Group[T]], lacking: int) -> list[Offer[T]]:
    """By rising score of all offers; a dearer and larger one of the same group takes a smaller one's place."""
    owner = {id(offer): number for number, group in enumerate(groups) for offer in group}
    taken: dict[int, Offer[T]] = {}
    for offer in sorted((offer for group in groups for offer in group), key=lambda offer: offer.score):
        held = taken.get(owner[id(offer)])
        if held is None or held.nbytes < offer.nbytes:
            taken[owner[id(offer)]] = offer
            lacking -= offer.nbytes - (held.nbytes if held else 0)
        if lacking <= 0:
            break
    return list(taken.values())


def _trimmed(chosen: list[Offer[T]], groups: Sequence[Group[T]], lacking: int) -> list[Offer[T]]:
    """The dearest first: left out where the others make up for it, else the cheapest of its group that still does."""
    owner = {id(offer): group for group in groups for offer in group}
    spare = sum(offer.nbytes for offer in chosen) - lacking
    kept = []
    for offer in sorted(chosen, key=lambda offer: offer.cost, reverse=True):
        if offer.nbytes <= spare:
            spare -= offer.nbytes
            continue
        enough = [other for other in owner[id(offer)] if offer.nbytes - other.nbytes <= spare]
        least = min(enough, key=lambda other: other.cost)
        spare -= offer.nbytes - least.nbytes
        kept.append(least)
    return kept


def _cost(chosen: Sequence[Offer[T]]) -> float:
    return sum(offer.cost for offer in chosen)
