"""What copies and computing take, as a few steps show: then the number of slots can be chosen."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mball.swap.layers_copy import Copier, Fetch
from mball.swap.layers_plan import Rates

STEPS = 8
"""Measured after a start or a change; the steps after them cost nothing more."""


@dataclass(slots=True)
class _Step:
    begun: Any
    ended: Any = None
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)


class Watch:
    """Of one model's steps, while it streams layers. `rates` are known once STEPS steps were seen."""

    def __init__(self, num_layers: int) -> None:
        self.rates: Rates | None = None
        self._num_layers = num_layers
        self._steps: list[_Step] = []
        self._watching = True

    def anew(self) -> None:
        """The steps so far tell nothing of those that come, but what was known stays until there is better."""
        self.cut()
        self._watching = True

    def cut(self) -> None:
        """Something came between two steps, or a step did not end."""
        self._steps.clear()

    def begin(self, copier: Copier) -> Rates | None:
        """A step begins; the rates, once, when there are enough steps."""
        if not self._watching:
            return None
        # The last one may not be past on its device yet.
        if len(self._steps) > STEPS:
            self._watching = False
            found = self._judge(copier, self._steps[:-1])
            self._steps.clear()
            self.rates = found or self.rates
            return found
        self._steps.append(_Step(copier.stamp()))
        return None

    def stamp(self, copier: Copier) -> Any:
        return copier.stamp() if self._steps else None

    def waited(self, before: Any, copier: Copier, fetch: Fetch) -> None:
        if self._steps and before is not None:
            self._steps[-1].waits.append((before, copier.stamp()))
            self._steps[-1].fetches.append(fetch)

    def end(self, copier: Copier) -> None:
        if self._steps:
            self._steps[-1].ended = copier.stamp()

    def _judge(self, copier: Copier, steps: list[_Step]) -> Rates | None:
        computing: list[float] = []
        idle: list[float] = []
        copies = [fetch.seconds for step in steps for fetch in step.fetches]
        for step, following in pairwise(steps):
            took = copier.between(step.begun, step.ended)
            waits = [copier.between(*wait) for wait in step.waits]
            gap = copier.between(step.ended, following.begun)
            if took is not None and gap is not None and None not in waits:
                computing.append((took - sum(wait or 0.0 for wait in waits)) / self._num_layers)
                idle.append(gap)
        known = [seconds for seconds in copies if seconds is not None]
        if not computing or not known:
            return None
        # Between two requests there may be any time: the shortest gap is the one that copies have to hide behind.
        return Rates(statistics.median(known), max(0.0, statistics.median(computing)), max(0.0, min(idle)))
