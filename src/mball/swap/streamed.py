"""The weights of a model of which a part is not on its device: loaded like `mball.loader.weights.Weights`, and changed
while the model computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from mball.errors import TransitionError, UnsupportedCheckpoint
from mball.loader.binding import Slot, extents_of
from mball.loader.checkpoint import Checkpoint
from mball.loader.fill import Options, fill
from mball.loader.plan import Extent, aligned, chunked
from mball.loader.weights import LoadStats
from mball.loader.workers import Progress
from mball.swap.layers_cells import Cells
from mball.swap.layers_copy import Copier, CudaCopier, HostCopier, Parts
from mball.swap.layers_plan import LEAST_SLOTS
from mball.swap.layers_read import PART_BYTES

CopierFor = Callable[[int | None], Copier]
"""From an image, or from the shards."""

Views = list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]
"""Where a module keeps a tensor, under which name, and the tensor."""


class Stream(Protocol):
    """What decides which part is in which cell: of layers, or of experts."""

    @property
    def home(self) -> dict[int, int]:
        """The cells of the parts that are on the device from the start."""

    def start(self, copier: Copier) -> None:
        """What `home` tells is in its cells."""

    def stop(self) -> None:
        """No fetch is under way any more. Raises TransitionError where a read hangs."""

    def replace(self, copier: Copier) -> None:
        """From another source. Raises TransitionError where a read from the one before hangs."""

    def cancel(self) -> None:
        """Whoever waits for a part fails soon. Called by any thread."""

    def change(self, cells: int) -> None:
        """Have that many cells. Raises DeviceOutOfMemory, DeviceError, TransitionError; then nothing has changed."""


class StreamedWeights:
    """Made by `bind` of those who know the parts. One thread computes with it; all else is done between two steps, but
    for `cancel`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cells: Cells,
        rest: Sequence[Slot],
        parts: Sequence[Parts],
        stream: Stream,
        copier_for: CopierFor,
    ) -> None:
        self._checkpoint = checkpoint
        self._cells = cells
        self._rest = rest
        self._parts = parts
        self._stream = stream
        self._copier_for = copier_for
        self._placed = False
        self.load_rate: float | None = None

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

    def bytes_of(self, cells: int) -> int:
        """`nbytes` with that many cells."""
        return self._cells.bytes_of(cells)

    @property
    def gives_bytes(self) -> int:
        """What can be given up beside what is away already."""
        return self.bytes_of(self.cells) - self.bytes_of(self.least_cells)

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
            for part, cell in self._stream.home.items():
                at = self._cells.offset(cell)
                extents += [replace(extent, offset=extent.offset + at) for extent in self._parts[part].extents]
            filled = fill(
                extents, self._checkpoint, self._cells, Options(threads, progress=progress, cancel=cancel), image_fd
            )
            self._stream.start(self._copier_for(image_fd))
            undo.pop_all()
        seconds = time.perf_counter() - begin
        self.load_rate = filled.nbytes / seconds
        return LoadStats(filled.nbytes, seconds, filled.by_way)

    def use_image(self, image_fd: int | None) -> None:
        """Stream from this image from now on, or from the shards; the one before is not read any more.

        Raises ReadError, OSError, TransitionError.
        """
        if self._cells.held:
            self._stream.replace(self._copier_for(image_fd))

    def resize(self, cells: int) -> None:
        """Have that many cells: more or less of the model stays on the device, from the next step on.

        Raises DeviceOutOfMemory, DeviceError, TransitionError; then nothing has changed.
        """
        if not self.least_cells <= cells <= self.max_cells:
            raise TransitionError(f"{cells} cells: {self.least_cells} to {self.max_cells} are possible")
        self._stream.change(cells)

    def release(self) -> int:
        """The bytes given back. Raises TransitionError where a read that hangs may still write there."""
        if not self._cells.held:
            return 0
        self._stream.stop()
        return self._cells.release()

    def cancel(self) -> None:
        """Whoever waits for a part fails soon. Called by any thread, before `close`."""
        self._stream.cancel()

    def close(self) -> None:
        """Release for good."""
        self.release()
        self._cells.close()

    def _place_rest(self) -> None:
        if not self._placed:
            for slot in self._rest:
                for tensors, leaf, tensor in views_of(slot, self._cells, 0):
                    tensors[leaf] = tensor
            self._placed = True


def views_of(slot: Slot, cells: Cells, at: int) -> Views:
    """The slot's tensor in the cells' memory, where the slot's stretch begins at byte `at`."""
    view = cells.view(at + slot.offset, tuple(slot.tensor.shape), slot.dtype)
    if isinstance(slot.tensor, nn.Parameter):
        parameter = nn.Parameter(view, requires_grad=False)
        return [(module._parameters, leaf, parameter) for module, leaf in slot.places]  # type: ignore[misc]
    return [(module._buffers, leaf, view) for module, leaf in slot.places]


def laid_out(slots: Sequence[Slot]) -> int:
    """Gives each slot its offset; the bytes of all."""
    nbytes = 0
    for slot in slots:
        slot.offset = aligned(nbytes)
        nbytes = slot.offset + slot.nbytes
    return nbytes


def parts_of(number: int, extents: Iterable[Extent], nbytes: int) -> Parts:
    return Parts(number, tuple(chunked(extents, PART_BYTES)), nbytes)


def copiers(checkpoint: Checkpoint, parts: Sequence[Parts], device: torch.device, threads: int) -> CopierFor:
    """Raises UnsupportedCheckpoint where a GPU would have to cast what passes."""
    if device.type != "cuda":
        return lambda image_fd: HostCopier(checkpoint, image_fd, threads)
    for extent in (extent for own in parts for extent in own.extents):
        if extent.cast is not None:
            raise UnsupportedCheckpoint(
                f"is {extent.cast.source} and served as {extent.cast.target}: a GPU streams weights as they are "
                "stored; set dtype to what is stored, or store it as it is served",
                file=str(checkpoint.path),
                tensor=checkpoint.tensor_at(extent.shard, extent.start),
            )
    return lambda image_fd: CudaCopier(checkpoint, image_fd, parts, device, threads)
