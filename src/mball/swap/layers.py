"""The weights of a model some of whose layers are not on its device: bound like `mball.loader.weights.Weights`, and
changed while the model computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from mball.device.account import Account, OpenAccount
from mball.errors import TensorMismatch, TransitionError, UnsupportedCheckpoint
from mball.loader.binding import Piece, Slot, extents_of, first_byte, keep_other_buffers, match
from mball.loader.checkpoint import Checkpoint
from mball.loader.fill import Options, fill
from mball.loader.plan import Extent, aligned, chunked
from mball.loader.weights import LoadStats
from mball.loader.workers import Progress
from mball.swap.layers_cells import Cells
from mball.swap.layers_copy import Copier, CudaCopier, HostCopier, Parts
from mball.swap.layers_plan import LEAST_SLOTS, Layout, layout, paged
from mball.swap.layers_read import PART_BYTES
from mball.swap.layers_stream import LayerStream, hook

CopierFor = Callable[[int | None], Copier]
"""From an image, or from the shards."""


class LayeredWeights:
    """Made by `bind`. One thread computes with it; all else is done between two steps, but for `cancel`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cells: Cells,
        rest: Sequence[Slot],
        layers: Sequence[Sequence[Slot]],
        modules: Sequence[nn.Module],
        copier_for: CopierFor,
    ) -> None:
        self._checkpoint = checkpoint
        self._cells = cells
        self._rest = rest
        self._layers = layers
        self._parts = [_parts(number, slots, checkpoint) for number, slots in enumerate(layers)]
        self._copier_for = copier_for
        self._views: dict[tuple[int, int], list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]] = {}
        self._stream = LayerStream(self._parts, cells, self._bind, layout(len(layers), cells.cells))
        self._placed = False
        hook(modules, self._stream)

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
        threads: int = 4,
    ) -> LayeredWeights:
        """As `Weights.bind`, of a module whose `layers` run one after the other, with room for `cells` of them.

        `threads` read layers that have no image. Tensors that layers share, with each other or with what is beside
        them, stay on the device. Raises TensorMismatch; UnsupportedCheckpoint where a GPU would have to cast layers as
        they pass; DeviceError.
        """
        slots, defects = match(module, checkpoint, dtype, sources or {}, ignore)
        defects += keep_other_buffers(module, {id(slot.tensor) for slot in slots}, device)
        if defects:
            raise TensorMismatch("; ".join(defects), file=str(checkpoint.path))
        slots.sort(key=lambda slot: first_byte(slot, checkpoint))
        rest, of_layers = _divided(slots, layers)
        rest_bytes = paged(_laid_out(rest))
        cell_bytes = paged(max(_laid_out(own) for own in of_layers))
        parts = [_parts(number, own, checkpoint) for number, own in enumerate(of_layers)]
        if device.type == "cuda":
            _refuse_casts(parts, checkpoint)
        held = Cells(rest_bytes, cell_bytes, cells, device, account or OpenAccount())

        def copier_for(image_fd: int | None) -> Copier:
            if device.type == "cuda":
                return CudaCopier(checkpoint, image_fd, parts, device, cell_bytes, threads)
            return HostCopier(checkpoint, image_fd, threads)

        return cls(checkpoint, held, rest, of_layers, layers, copier_for)

    @property
    def nbytes(self) -> int:
        """Bytes on the device while loaded, slots included."""
        return self._cells.bytes_of(self._cells.cells)

    @property
    def cells(self) -> int:
        return self._cells.cells

    @property
    def max_cells(self) -> int:
        return self._cells.max_cells

    @property
    def least_cells(self) -> int:
        return min(LEAST_SLOTS, self.max_cells)

    @property
    def layout(self) -> Layout:
        return self._stream.layout

    def bytes_of(self, cells: int) -> int:
        """`nbytes` with that many cells."""
        return self._cells.bytes_of(cells)

    def load(
        self,
        image_fd: int | None = None,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> LoadStats:
        """Fill what is resident, from the source image where one is given, and begin to stream the rest from there.

        Raises ReadError, Cancelled, DeviceOutOfMemory, TimeoutError; then nothing is held on the device.
        """
        begin = time.perf_counter()
        with ExitStack() as undo:
            self._cells.populate()
            undo.callback(self._cells.release)
            self._place_rest()
            extents = [extent for slot in self._rest for extent in extents_of(slot, self._checkpoint)]
            for layer, cell in self._stream.home.items():
                at = self._cells.offset(cell)
                extents += [replace(extent, offset=extent.offset + at) for extent in self._parts[layer].extents]
            filled = fill(
                extents, self._checkpoint, self._cells, Options(threads, progress=progress, cancel=cancel), image_fd
            )
            self._stream.start(self._copier_for(image_fd))
            undo.pop_all()
        return LoadStats(filled.nbytes, time.perf_counter() - begin, filled.by_way)

    def use_image(self, image_fd: int | None) -> None:
        """Stream from this image from now on, or from the shards; the one before is not read any more.

        Raises ReadError, OSError, TransitionError.
        """
        if self._cells.held:
            self._stream.replace(self._copier_for(image_fd))

    def resize(self, cells: int) -> None:
        """Have that many cells: more or fewer layers stay on the device, from the next step on.

        Raises DeviceOutOfMemory, DeviceError, TransitionError; then nothing has changed.
        """
        if not self.least_cells <= cells <= self.max_cells:
            raise TransitionError(f"{cells} cells for layers: {self.least_cells} to {self.max_cells} are possible")
        self._stream.change(cells)

    def release(self) -> int:
        """The bytes given back. Raises TransitionError where a read that hangs may still write there."""
        if not self._cells.held:
            return 0
        self._stream.stop()
        return self._cells.release()

    def cancel(self) -> None:
        """Whoever waits for a layer fails soon. Called by any thread, before `close`."""
        self._stream.cancel()

    def close(self) -> None:
        """Release for good."""
        self.release()
        self._cells.close()

    def _place_rest(self) -> None:
        if not self._placed:
            for slot in self._rest:
                for tensors, leaf, tensor in self._view(slot, 0):
                    tensors[leaf] = tensor
            self._placed = True

    def _bind(self, layer: int, cell: int) -> None:
        views = self._views.get((layer, cell))
        if views is None:
            at = self._cells.offset(cell)
            views = [view for slot in self._layers[layer] for view in self._view(slot, at)]
            self._views[layer, cell] = views
        for tensors, leaf, tensor in views:
            tensors[leaf] = tensor

    def _view(self, slot: Slot, at: int) -> list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
        view = self._cells.view(at + slot.offset, tuple(slot.tensor.shape), slot.dtype)
        if isinstance(slot.tensor, nn.Parameter):
            parameter = nn.Parameter(view, requires_grad=False)
            return [(module._parameters, leaf, parameter) for module, leaf in slot.places]  # type: ignore[misc]
        return [(module._buffers, leaf, view) for module, leaf in slot.places]


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


def _laid_out(slots: Sequence[Slot]) -> int:
    """Gives each slot its offset; the bytes of all."""
    nbytes = 0
    for slot in slots:
        slot.offset = aligned(nbytes)
        nbytes = slot.offset + slot.nbytes
    return nbytes


def _parts(number: int, slots: Sequence[Slot], checkpoint: Checkpoint) -> Parts:
    extents: list[Extent] = [extent for slot in slots for extent in extents_of(slot, checkpoint)]
    nbytes = max((slot.offset + slot.nbytes for slot in slots), default=0)
    return Parts(number, tuple(chunked(extents, PART_BYTES)), nbytes)


def _refuse_casts(parts: Sequence[Parts], checkpoint: Checkpoint) -> None:
    for extent in (extent for own in parts for extent in own.extents):
        if extent.cast is not None:
            raise UnsupportedCheckpoint(
                f"is {extent.cast.source} and served as {extent.cast.target}: a GPU streams layers as they are stored; "
                "set dtype to what is stored, or store it as it is served",
                file=str(checkpoint.path),
                tensor=checkpoint.tensor_at(extent.shard, extent.start),
            )
