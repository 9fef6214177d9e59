"""Streams experts of a mixture by the router's choice: those that are chosen most have cells, the others pass through.

A layer's turn begins once it is known which experts its tokens chose. Those that are there are computed first, while
the others come; each takes the cell of the one that is worth least. Behind them the bus brings back, ahead of its
layer's turn, what is worth more than what gave way to it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mball.errors import MballError, TransitionError
from mball.swap.experts_worth import Worth
from mball.swap.layers_cells import Cells
from mball.swap.layers_copy import Copier, Fetch, Parts

MOST_FETCHES = 8
"""Under way at once: enough for a bus or a disk, few enough that a wrong guess delays little."""

_log = logging.getLogger(__name__)


class ExpertStream:
    """Of one model, while its weights are held. Experts are numbered over all layers: those of a layer follow one
    another, `counts` of them in each. All is called between two steps, or by the thread that computes."""

    def __init__(self, experts: Sequence[Parts], counts: Sequence[int], cells: Cells) -> None:
        self._experts = experts
        self._cells = cells
        self._layers: list[range] = []
        for count in counts:
            first = self._layers[-1].stop if self._layers else 0
            self._layers.append(range(first, first + count))
        self._rank = {expert: expert - layer.start for layer in self._layers for expert in layer}
        self._worth = Worth(len(experts))
        self._last: list[int] = [0] * len(counts)
        self._copier: Copier | None = None
        self._cell_of: dict[int, int] = {}
        self._free: list[int] = []
        self._fetches: dict[int, Fetch] = {}
        self._busy: set[int] = set()
        self._before: Any = None
        self._touched: set[int] = set()
        self._broken = False
        self.hits = self.misses = self.steps = 0

    @property
    def home(self) -> dict[int, int]:
        """What was worth most so far; at first as many of each layer."""
        order = sorted(self._rank, key=lambda expert: (-self._worth[expert], self._rank[expert], expert))
        return {expert: cell for cell, expert in enumerate(order[: self._cells.cells])}

    def start(self, copier: Copier) -> None:
        self._copier = copier
        self._cell_of = self.home
        self._free = list(range(len(self._cell_of), self._cells.cells))
        self._worth.hold(self._cell_of)
        self._broken = False

    def stop(self) -> None:
        self._settle()
        self._cell_of.clear()
        copier, self._copier = self._copier, None
        if copier is not None and not copier.close():
            raise TransitionError("a thread that reads an expert hangs in the kernel: restart the worker")

    def replace(self, copier: Copier) -> None:
        self._settle()
        before, self._copier = self._copier, copier
        if before is not None:
            before.close()

    def cancel(self) -> None:
        copier = self._copier
        if copier is not None:
            copier.cancel()

    def change(self, cells: int) -> None:
        before = self._cells.cells
        self._settle()
        if self._copier is None:
            self._cells.resize(cells)
        elif cells > before:
            self._cells.resize(cells)
            self._free += range(before, cells)
        else:
            self._leave(cells)
            self._cells.resize(cells)

    def turn(self, layer: int, shares: Mapping[int, float]) -> Iterator[tuple[int, int]]:
        """Each expert that a layer's tokens chose, and the cell it is in; what is computed with it is queued before the
        next one is asked for. `shares` are the chosen ones' parts of the tokens.

        Raises ReadError and its kin; the next step begins anew.
        """
        copier = self._working()
        if self._broken:
            self._settle()
        if layer == 0:
            self._worth.step()
            self.steps += 1
        own = self._layers[layer]
        chosen = [own[number] for number in shares]
        for expert, share in zip(chosen, shares.values(), strict=True):
            self._worth.chosen(expert, share)
        self._before, self._touched = copier.used(), set()
        self._last[layer] = len(chosen)
        for expert in self._arrived(copier, chosen):
            cell = self._cell_of[expert]
            yield self._rank[expert], cell
            self._busy.discard(expert)
            self._touched.add(cell)
        self._take_in_strays()
        self._fetch_ahead(copier, (layer + 1) % len(self._layers))

    def _arrived(self, copier: Copier, chosen: Sequence[int]) -> Iterator[int]:
        """In the order in which they are there; few cells are enough, one after the other."""
        wanted = set(chosen)
        coming = [expert for expert in self._fetches if expert in wanted]
        most = MOST_FETCHES + len(self._fetches) - len(coming)
        ready = deque(expert for expert in chosen if expert in self._cell_of and expert not in self._fetches)
        self.hits += len(ready) + len(coming)
        ready.extend(coming)
        self._busy = set(ready)
        missing = deque(self._worth.best((expert for expert in chosen if expert not in self._cell_of), len(chosen)))
        self.misses += len(missing)
        while ready or missing:
            while missing and len(self._fetches) < most and self._fetch(copier, missing[0]):
                self._busy.add(missing[0])
                ready.append(missing.popleft())
            if not ready:
                raise TransitionError(f"{self._cells.cells} cells for experts, and none is free")
            expert = ready.popleft()
            if expert in self._fetches:
                try:
                    self._fetches[expert].arrive()
                except BaseException:
                    self._broken = True
                    raise
                del self._fetches[expert]
            yield expert

    def _take_in_strays(self) -> None:
        """What was fetched ahead and not chosen has come by now: before what was."""
        for expert, fetch in list(self._fetches.items()):
            try:
                fetch.arrive()
                del self._fetches[expert]
            except (MballError, OSError) as error:
                self._broken = True
                _log.warning("an expert could not be fetched ahead: %s", error)
                return

    def _fetch_ahead(self, copier: Copier, layer: int) -> None:
        """Of the layer whose turn is next: as many as it chose last."""
        if self._broken:
            return
        away = (expert for expert in self._layers[layer] if expert not in self._cell_of)
        for expert in self._worth.best(away, self._last[layer]):
            if len(self._fetches) >= MOST_FETCHES:
                return
            try:
                if not self._fetch(copier, expert, self._worth[expert]):
                    return
            except (MballError, OSError) as error:
                # The step that wants it tries again, and is told.
                _log.warning("experts can't be fetched ahead: %s", error)
                return

    def _fetch(self, copier: Copier, expert: int, below: float | None = None) -> bool:
        """Begin to fetch it into a free cell, or in the place of one that is worth less than `below`."""
        if self._free:
            cell = self._free.pop()
        else:
            gone = self._worth.take_least(lambda other: other not in self._busy, below)
            if gone is None:
                return False
            cell = self._cell_of.pop(gone)
            fetch = self._fetches.pop(gone, None)
            if fetch is not None and not fetch.settle():
                self._broken = True
                raise TransitionError("an expert is still being read: its disk hangs")
        after = copier.used() if cell in self._touched else self._before
        try:
            self._fetches[expert] = copier.fetch(self._experts[expert], self._cells.cell(cell), after)
        except BaseException:
            self._free.append(cell)
            self._broken = True
            raise
        self._cell_of[expert] = cell
        self._worth.add(expert)
        return True

    def _leave(self, cells: int) -> None:
        """Only the first so many cells are used, by those that are worth most."""
        stay = self._worth.best(self._cell_of, cells)
        cell_of = {expert: self._cell_of[expert] for expert in stay if self._cell_of[expert] < cells}
        free = sorted(set(range(cells)) - set(cell_of.values()), reverse=True)
        for expert in stay:
            if expert not in cell_of:
                cell_of[expert] = free.pop()
                self._cells.move(self._cell_of[expert], cell_of[expert])
        self._cell_of, self._free = cell_of, free
        self._worth.hold(cell_of)

    def _settle(self) -> None:
        """What is under way is there no more, whether it came or not. Raises TransitionError where a fetch hangs."""
        if not all(fetch.settle() for fetch in self._fetches.values()):
            self._broken = True
            raise TransitionError("an expert is still being read: its disk hangs")
        for expert in self._fetches:
            self._free.append(self._cell_of.pop(expert))
        self._fetches.clear()
        self._worth.hold(self._cell_of)
        if self._copier is not None and not self._copier.reset():
            self._broken = True
            raise TransitionError("an expert is still being read: its disk hangs")
        self._before, self._touched = (None, set()) if self._copier is None else (self._copier.used(), set())
        self._broken = False

    def _working(self) -> Copier:
        if self._copier is None:
            raise TransitionError("the experts are not on the device")
        return self._copier
