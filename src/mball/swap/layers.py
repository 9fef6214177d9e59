"""The weights of a model whose layers pass through fewer cells than there are layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from mball.device.account import Account, OpenAccount
from mball.loader.binding import Piece, Slot, extents_of, slots_of
from mball.loader.checkpoint import Checkpoint
from mball.swap.layers_cells import Cells
from mball.swap.layers_copy import Parts
from mball.swap.layers_plan import Layout, layout, paged, step_s
from mball.swap.layers_stream import LayerStream, hook
from mball.swap.streamed import CopierFor, StreamedWeights, Views, copiers, laid_out, parts_of, views_of


class LayeredWeights(StreamedWeights):
    """Made by `bind`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cells: Cells,
        rest: Sequence[Slot],
        layers: Sequence[Sequence[Slot]],
        modules: Sequence[nn.Module],
        parts: Sequence[Parts],
        copier_for: CopierFor,
    ) -> None:
        self._layers = layers
        self._views: dict[tuple[int, int], Views] = {}
        self._layer_stream = LayerStream(parts, cells, self._bind, layout(len(layers), cells.cells))
        super().__init__(checkpoint, cells, rest, parts, self._layer_stream, copier_for)
        hook(modules, self._layer_stream)

    @classmethod
    def bind(
        cls,
        module: nn.Module,
        layers: Sequence[nn.Module],
        checkpoint: Checkpoint,
        *,
        cells: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        sources: Mapping[str, Sequence[Piece]] | None = None,
        ignore: Collection[str] = (),
        account: Account | None = None,
        threads: int = 8,
    ) -> LayeredWeights:
        """As `Weights.bind`, of a module whose `layers` run one after the other, with room for `cells` of them.

        `threads` read layers that have no image: some copy while others keep the disk busy. Tensors that layers share,
        with each other or with what is beside them, stay on the device. Raises TensorMismatch; UnsupportedCheckpoint
        where a GPU would have to cast layers as they pass; DeviceError.
        """
        slots = slots_of(module, checkpoint, dtype, sources or {}, ignore, device)
        rest, of_layers = _divided(slots, layers)
        rest_bytes = paged(laid_out(rest))
        cell_bytes = paged(max(laid_out(own) for own in of_layers))
        parts = [_parts(number, own, checkpoint) for number, own in enumerate(of_layers)]
        copier_for = copiers(checkpoint, parts, device, threads)
        held = Cells(rest_bytes, cell_bytes, cells, device, account or OpenAccount())
        return cls(checkpoint, held, rest, of_layers, layers, parts, copier_for)

    @property
    def layout(self) -> Layout:
        return self._layer_stream.layout

    @property
    def longer_s(self) -> float | None:
        """How much longer a step takes once all `gives_bytes` are given: by what copies and computing took, where that
        was measured, else at the rate of the load, behind no computing. None while neither is known."""
        now, least = self.layout, layout(len(self._layers), self.least_cells)
        rates = self._layer_stream.rates
        if rates is not None:
            return max(0.0, step_s(least, rates) - step_s(now, rates))
        further = len(least.streamed) - len(now.streamed)
        return None if self.load_rate is None else further * self._cells.cell_bytes / self.load_rate

    def _bind(self, layer: int, cell: int) -> None:
        views = self._views.get((layer, cell))
        if views is None:
            at = self._cells.offset(cell)
            views = [view for slot in self._layers[layer] for view in views_of(slot, self._cells, at)]
            self._views[layer, cell] = views
        for tensors, leaf, tensor in views:
            tensors[leaf] = tensor


def _divided(slots: Sequence[Slot], layers: Sequence[nn.Module]) -> tuple[list[Slot], list[list[Slot]]]:
    """What no layer has to itself, and each layer's own."""
    owner = {id(module): number for number, layer in enumerate(layers) for module in layer.modules()}
    rest: list[Slot] = []
    own: list[list[Slot]] = [[] for _ in layers]
    for slot in slots:
        owners = {owner.get(id(module)) for module, _ in slot.places}
        number = owners.pop() if len(owners) == 1 else None
        (rest if number is None else own[number]).append(slot)
    return rest, own


def _parts(number: int, slots: Sequence[Slot], checkpoint: Checkpoint) -> Parts:
    nbytes = max((slot.offset + slot.nbytes for slot in slots), default=0)
    return parts_of(number, (extent for slot in slots for extent in extents_of(slot, checkpoint)), nbytes)
