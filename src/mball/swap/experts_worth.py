"""How much each expert of a model is worth on the device: how often it was chosen lately. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

HALF_LIFE_STEPS = 200
"""A choice counts half after so many steps: long enough to tell hot from cold, short enough to follow a new topic."""

_MOST = 1e200


class Worth:
    """Of `count` experts, numbered over all layers; the least worth of those that are held goes first.

    A choice counts more by a constant factor with every step: as good as letting all others fade, and nothing has to be
    touched. So worth only grows, and a heap whose entries are too low where they are wrong finds the least.
    """

    def __init__(self, count: int) -> None:
        self._values = [0.0] * count
        self._unit = 1.0
        self._growth = 2.0 ** (1 / HALF_LIFE_STEPS)
        self._heap: list[tuple[float, int]] = []

    def __getitem__(self, expert: int) -> float:
        return self._values[expert]

    def step(self) -> None:
        """A step begins."""
        self._unit *= self._growth
        if self._unit > _MOST:
            self._values = [value / self._unit for value in self._values]
            self._heap = [(value / self._unit, expert) for value, expert in self._heap]
            self._unit = 1.0

    def chosen(self, expert: int, share: float) -> None:
        """By that share of the step's tokens."""
        self._values[expert] += share * self._unit

    def hold(self, experts: Iterable[int]) -> None:
        """These are held, and no others."""
        self._heap = [(self._values[expert], expert) for expert in experts]
        heapq.heapify(self._heap)

    def add(self, expert: int) -> None:
        """This one is held as well."""
        heapq.heappush(self._heap, (self._values[expert], expert))

    def take_least(self, may_go: Callable[[int], bool], below: float | None = None) -> int | None:
        """The least worth of those that are held and may go, which is held no more; None where there is none that is
        worth less than `below`."""
        kept: list[tuple[float, int]] = []
        found: int | None = None
        while self._heap:
            value, expert = self._heap[0]
            if value != self._values[expert]:
                heapq.heapreplace(self._heap, (self._values[expert], expert))
            elif below is not None and value >= below:
                break
            else:
                heapq.heappop(self._heap)
                if may_go(expert):
                    found = expert
                    break
                kept.append((value, expert))
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found

    def best(self, experts: Iterable[int], count: int) -> list[int]:
        """So many of them that are worth most, the lower number first where they are worth the same."""
        return heapq.nsmallest(count, experts, key=lambda expert: (-self._values[expert], expert))
