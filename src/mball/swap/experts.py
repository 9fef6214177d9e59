"""The weights of a mixture of experts whose experts pass through fewer cells than there are experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mball.device.account import Account, OpenAccount
from mball.loader.binding import Piece, Slot, extents_of, slots_of
from mball.loader.checkpoint import Checkpoint
from mball.loader.plan import Extent, aligned
from mball.swap.experts_stream import ExpertStream
from mball.swap.layers_cells import Cells
from mball.swap.layers_copy import Parts
from mball.swap.layers_plan import paged
from mball.swap.streamed import CopierFor, StreamedWeights, copiers, laid_out, parts_of


@dataclass(frozen=True, slots=True)
class Expert:
    """One that was chosen, by its number in its layer: its part of each of the module's tensors, by name."""

    number: int
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Part:
    """One expert's part of a tensor, from byte `offset` of its cell on."""

    leaf: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ExpertWeights(StreamedWeights):
    """Made by `bind`. The experts' own tensors stay without memory: what is computed with comes from `turn`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cells: Cells,
        rest: Sequence[Slot],
        parts: Sequence[Parts],
        counts: Sequence[int],
        tensors: Sequence[Sequence[_Part]],
        copier_for: CopierFor,
    ) -> None:
        self._tensors = tensors
        self._views: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}
        self._expert_stream = ExpertStream(parts, counts, cells)
        super().__init__(checkpoint, cells, rest, parts, self._expert_stream, copier_for)

    @classmethod
    def bind(
        cls,
        module: nn.Module,
        experts: Sequence[nn.Module],
        checkpoint: Checkpoint,
        *,
        cells: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        sources: Mapping[str, Sequence[Piece]] | None = None,
        ignore: Collection[str] = (),
        account: Account | None = None,
        threads: int = 4,
    ) -> ExpertWeights:
        """As `Weights.bind`, of a module with `experts`, one module a layer in the order in which they run: all their
        parameters have the experts as their first dimension. `cells` of the experts of all layers have room.

        All else stays on the device. Raises as `LayeredWeights.bind`.
        """
        slots = slots_of(module, checkpoint, dtype, sources or {}, ignore, device)
        layer_of = {id(own): layer for layer, own in enumerate(experts)}
        rest = [slot for slot in slots if id(slot.places[0][0]) not in layer_of]
        counts: list[int] = []
        tensors: list[list[_Part]] = []
        parts: list[Parts] = []
        for own in experts:
            of_layer = [slot for slot in slots if slot.places[0][0] is own]
            counts.append(int(of_layer[0].tensor.shape[0]))
            tensors.append(_part_each(of_layer, counts[-1]))
            parts += _parts(of_layer, tensors[-1], counts[-1], len(parts), checkpoint)
        rest_bytes, cell_bytes = paged(laid_out(rest)), paged(max(part.nbytes for part in parts))
        copier_for = copiers(checkpoint, parts, device, threads)
        held = Cells(rest_bytes, cell_bytes, min(cells, len(parts)), device, account or OpenAccount())
        return cls(checkpoint, held, rest, parts, counts, tensors, copier_for)

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return len(self._parts)

    @property
    def hits(self) -> int:
        """Times that an expert which was chosen was there, or on its way already."""
        return self._expert_stream.hits

    @property
    def misses(self) -> int:
        return self._expert_stream.misses

    @property
    def longer_s(self) -> float | None:
        """How much longer a step takes at most once all `gives_bytes` are given: every expert that was there comes, at
        the rate of the load. None while that, or what steps choose, is not known."""
        if self.load_rate is None or self._expert_stream.steps == 0:
            return None
        return self.hits / self._expert_stream.steps * self._cells.cell_bytes / self.load_rate

    def turn(self, layer: int, shares: Mapping[int, float]) -> Iterator[Expert]:
        """The experts that a layer's tokens chose, as they are there; see ExpertStream.turn."""
        for number, cell in self._expert_stream.turn(layer, shares):
            yield Expert(number, self._views_of(layer, cell))

    def _views_of(self, layer: int, cell: int) -> Mapping[str, torch.Tensor]:
        views = self._views.get((layer, cell))
        if views is None:
            at = self._cells.offset(cell)
            views = {
                part.leaf: self._cells.view(at + part.offset, part.shape, part.dtype) for part in self._tensors[layer]
            }
            self._views[layer, cell] = views
        return views


def _part_each(slots: Sequence[Slot], count: int) -> list[_Part]:
    found: list[_Part] = []
    at = 0
    for slot in slots:
        found.append(_Part(slot.places[0][1], at, tuple(slot.tensor.shape[1:]), slot.dtype))
        at = aligned(at + slot.nbytes // count)
    return found


def _parts(
    slots: Sequence[Slot], tensors: Sequence[_Part], count: int, first: int, checkpoint: Checkpoint
) -> list[Parts]:
    """Of one layer's experts, which are numbered from `first` on."""
    extents: list[list[Extent]] = [[] for _ in range(count)]
    for slot, part in zip(slots, tensors, strict=True):
        for extent in extents_of(slot, checkpoint):
            for number, own in _cut(extent, slot.nbytes // count):
                extents[number].append(replace(own, offset=own.offset + part.offset))
    last, slot = tensors[-1], slots[-1]
    nbytes = last.offset + slot.nbytes // count
    return [parts_of(first + number, own, nbytes) for number, own in enumerate(extents)]


def _cut(extent: Extent, expert_bytes: int) -> Iterator[tuple[int, Extent]]:
    """An extent of a tensor of experts, by expert; offsets are in the expert's part."""
    whole = extent.cast.target_bytes(extent.nbytes) if extent.cast else extent.nbytes
    at = 0
    while at < whole:
        number, within = divmod(extent.offset + at, expert_bytes)
        count = min(expert_bytes - within, whole - at)
        stored = [position * extent.nbytes // whole for position in (at, at + count)]
        yield number, replace(extent, start=extent.start + stored[0], nbytes=stored[1] - stored[0], offset=within)
        at += count
