"""Streams layers through slots while the model computes: each layer's hooks tell when its turn comes and is over.

Positions count layers over all steps. A pointer runs ahead of the one that is computed and begins a fetch for every
streamed layer as long as a slot is free, and once for a resident layer that is not there yet: so a change of what is
resident moves no bytes by itself, and a layer that could not be read fails the step that wanted it, not the change.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mball.errors import MballError, TransitionError
from mball.swap.layers_cells import Cells
from mball.swap.layers_copy import Copier, Fetch, Parts
from mball.swap.layers_plan import MOST_SLOTS, Layout, Rates, layout
from mball.swap.layers_watch import Watch

Bind = Callable[[int, int], None]
"""Let a layer's tensors be those in a cell: (layer, cell)."""

_log = logging.getLogger(__name__)


class LayerStream:
    """Of one model, while its weights are held. All is called between two steps, or by the thread that computes."""

    def __init__(self, layers: Sequence[Parts], cells: Cells, bind: Bind, chosen: Layout) -> None:
        self._layers = layers
        self._cells = cells
        self._bind = bind
        self._copier: Copier | None = None
        self._layout = chosen
        self._watch = Watch(len(layers))
        self._home = dict(zip(chosen.resident, range(len(chosen.resident)), strict=True))
        self._slots = list(range(len(chosen.resident), len(chosen.resident) + chosen.slots))
        self._loaded: set[int] = set()
        self._fetches: dict[int, tuple[Fetch, int]] = {}
        self._free: deque[tuple[int, Any]] = deque()
        self._since: Any = None
        self._at = self._next = 0
        self._current = 0
        self._broken = False

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def rates(self) -> Rates | None:
        """What copies and computing took, once that was measured."""
        return self._watch.rates

    @property
    def home(self) -> dict[int, int]:
        """The resident layers' cells."""
        return dict(self._home)

    def start(self, copier: Copier) -> None:
        """The resident layers are in their cells."""
        self._copier = copier
        for layer, cell in self._home.items():
            self._bind(layer, cell)
        self._loaded = set(self._home)
        self._watch.anew()
        self._restart()

    def stop(self) -> None:
        """No fetch is under way any more. Raises TransitionError where a read hangs."""
        self._settle()
        self._loaded.clear()
        copier, self._copier = self._copier, None
        if copier is not None and not copier.close():
            raise TransitionError("a thread that reads a layer hangs in the kernel: restart the worker")

    def replace(self, copier: Copier) -> None:
        """From another source. Raises TransitionError where a read from the one before hangs."""
        self._settle()
        before, self._copier = self._copier, copier
        if before is not None:
            before.close()
        self._watch.anew()
        self._restart()

    def cancel(self) -> None:
        """Called by any thread."""
        copier = self._copier
        if copier is not None:
            copier.cancel()

    def change(self, cells: int) -> None:
        """Have that many cells. Raises DeviceOutOfMemory, DeviceError, TransitionError; then nothing has changed."""
        before = self._cells.cells
        self._settle()
        try:
            if cells > before:
                self._cells.resize(cells)
            self._arrange(layout(len(self._layers), cells, self._watch.rates))
            if cells < before:
                self._cells.resize(cells)
        finally:
            self._watch.anew()
            self._restart()

    def enter(self, layer: int) -> None:
        """A layer's turn comes. Raises ReadError and its kin; the next step begins anew."""
        if layer == 0:
            self._begin()
        if layer in self._loaded:
            return
        copier = self._working()
        try:
            self._issue()
            fetch, cell = self._fetches[layer]
            before = self._watch.stamp(copier)
            fetch.arrive()
            self._watch.waited(before, copier, fetch)
        except BaseException:
            self._broken = True
            raise
        del self._fetches[layer]
        self._bind(layer, cell)
        if layer in self._home:
            self._loaded.add(layer)
        self._current = cell

    def leave(self, layer: int) -> None:
        """A layer's turn is over."""
        self._at += 1
        if self._settled:
            return
        copier = self._working()
        if layer not in self._home:
            self._free.append((self._current, copier.used()))
        if layer == len(self._layers) - 1:
            self._watch.end(copier)
        self._issue()

    @property
    def _settled(self) -> bool:
        """All layers are in cells of their own."""
        return len(self._loaded) == len(self._layers)

    def _begin(self) -> None:
        if self._settled:
            return
        copier = self._working()
        if self._broken or self._at % len(self._layers):
            self._settle()
            self._restart()
        rates = self._watch.begin(copier)
        if rates is not None and self._cells.cells < len(self._layers):
            better = layout(len(self._layers), self._cells.cells, rates)
            if better != self._layout:
                _log.info("%d slots for streamed layers, not %d: %s", better.slots, self._layout.slots, rates)
                self._settle()
                self._arrange(better)
                self._restart()

    def _issue(self) -> None:
        copier, count = self._working(), len(self._layers)
        while self._next < self._at + count:
            layer = self._next % count
            if layer in self._home:
                if layer not in self._loaded and layer not in self._fetches:
                    if len(self._fetches) >= MOST_SLOTS:
                        break
                    self._fetch(copier, layer, self._home[layer], self._since)
            else:
                if not self._free:
                    break
                self._fetch(copier, layer, *self._free.popleft())
            self._next += 1
        copier.expect([self._layers[layer] for layer in self._upcoming()])

    def _upcoming(self) -> list[int]:
        """What will be fetched next, in order."""
        count = len(self._layers)
        wanted = ((self._next + step) % count for step in range(count))
        return [layer for layer in wanted if layer not in self._loaded and layer not in self._fetches][:MOST_SLOTS]

    def _fetch(self, copier: Copier, layer: int, cell: int, after: Any) -> None:
        try:
            self._fetches[layer] = copier.fetch(self._layers[layer], self._cells.cell(cell), after), cell
        except BaseException:
            self._broken = True
            if layer not in self._home:
                self._free.appendleft((cell, after))
            raise

    def _arrange(self, chosen: Layout) -> None:
        """Which layer has which cell, with as few as can be moved. The cells of both layouts are held."""
        cells = len(chosen.resident) + chosen.slots
        stay = [layer for layer in chosen.resident if layer in self._loaded]
        home = {layer: self._home[layer] for layer in stay if self._home[layer] < cells}
        free = [cell for cell in range(cells) if cell not in home.values()]
        for layer in stay:
            if layer not in home:
                # Nobody reads or writes the cell now: it was a slot, or a layer's that will be streamed.
                home[layer] = free.pop()
                self._cells.move(self._home[layer], home[layer])
                self._bind(layer, home[layer])
        self._loaded = set(stay)
        for layer in chosen.resident:
            if layer not in home:
                home[layer] = free.pop()
        self._home, self._slots, self._layout = home, free, chosen

    def _settle(self) -> None:
        """Raises TransitionError where a fetch does not end."""
        if not all(fetch.settle() for fetch, _ in self._fetches.values()):
            self._broken = True
            raise TransitionError("a layer is still being read: its disk hangs")
        self._fetches.clear()
        if self._copier is not None and not self._copier.reset():
            self._broken = True
            raise TransitionError("a layer is still being read ahead: its disk hangs")

    def _restart(self) -> None:
        """From the first layer; no fetch is under way."""
        self._broken = False
        self._at = self._next = 0
        self._watch.cut()
        copier = self._copier
        if copier is None:
            return
        self._since = copier.used()
        self._free = deque((cell, self._since) for cell in self._slots)
        if not self._settled:
            try:
                self._issue()
            except (MballError, OSError) as error:
                # The step that wants the layer tries again, and is told.
                _log.warning("layers can't be fetched ahead: %s", error)

    def _working(self) -> Copier:
        if self._copier is None:
            raise TransitionError("the layers are not on the device")
        return self._copier


def hook(layers: Sequence[nn.Module], stream: LayerStream) -> None:
    """Let each layer tell the stream of its turn."""
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: stream.enter(number))
        layer.register_forward_hook(lambda *_, number=number: stream.leave(number))
