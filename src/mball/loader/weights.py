"""The weights of one module: laid out in one slab, loaded into it, given back, loaded again."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mball.device.account import Account
from mball.loader.binding import Piece, Slot, extents_of, slots_of
from mball.loader.checkpoint import Checkpoint
from mball.loader.fill import Options, fill
from mball.loader.hub import resolve
from mball.loader.manifest import Manifest
from mball.loader.paths import EVERY_WAY, Way
from mball.loader.plan import Extent, aligned
from mball.loader.slab import Slab, open_slab
from mball.loader.source import ImageReader
from mball.loader.workers import Progress

__all__ = ["LoadStats", "Piece", "Weights", "load_into"]


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Bytes read, seconds taken, and on a GPU how many bytes came which way (see paths.Way)."""

    bytes: int
    seconds: float
    by_way: Mapping[str, int] = field(default_factory=dict)


class Weights:
    """Made by `bind`. Used by one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, slab: Slab, slots: list[Slot], extents: list[Extent]) -> None:
        self._checkpoint = checkpoint
        self._slab = slab
        self._slots = slots
        self._extents = extents
        self._placed = False
        if slab.addressable:
            self._place()

    @classmethod
    def bind(
        cls,
        module: nn.Module,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        sources: Mapping[str, Sequence[Piece]] | None = None,
        ignore: Collection[str] = (),
        account: Account | None = None,
    ) -> Weights:
        """Lay a meta-device module's parameters and persistent buffers out in one slab on `device`.

        No memory is taken. On the CPU the module's tensors are views of the slab from now on, on a GPU from the first
        load on. Tied tensors (one object under several names) share one view. A persistent buffer that the checkpoint
        lacks keeps the value the module gave it, as does every other buffer; all buffers are moved to `device`.

        `dtype` is wanted for floating-point tensors (None: what the module says). `sources` maps a module's tensor
        to the checkpoint's pieces that fill it without a gap; the default is the piece of the same name. `ignore`
        holds names of the checkpoint that the module has no use for.

        Raises TensorMismatch, which lists what is missing, unexpected or of another shape.
        """
        slots = slots_of(module, checkpoint, dtype, sources or {}, ignore, device)
        nbytes = 0
        for slot in slots:
            slot.offset = aligned(nbytes)
            nbytes = slot.offset + slot.nbytes
        extents = [extent for slot in slots for extent in extents_of(slot, checkpoint)]
        return cls(checkpoint, open_slab(nbytes, device, account), slots, extents)

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take on the device while loaded."""
        return self._slab.nbytes

    def load(
        self,
        image_fd: int | None = None,
        *,
        threads: int | None = None,
        ways: Collection[Way] = EVERY_WAY,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        verify: Manifest | None = None,
        fill_image_fd: int | None = None,
        stored: ImageReader | None = None,
    ) -> LoadStats:
        """Fill the module's tensors, from the source image where one is given, else as `stored` reads it, else from the
        shards.

        On a GPU the image's pages are registered with the driver, and stay so until `registered.IMAGES.detach`, which
        is to be called before the descriptor is closed. `ways` are those that bytes may take there. With `verify`, the
        checkpoint's manifest, every byte is checked on the way in. `fill_image_fd` is an empty image that is filled on
        the way: disk, image and device in one pass. `threads`: None for what the machine has.

        Raises ReadError, DigestMismatch, Cancelled, DeviceOutOfMemory, TimeoutError, and SwapMiss from `stored`; after
        an error nothing is held on the device.
        """
        begin = time.perf_counter()
        with ExitStack() as undo:
            self._slab.populate()
            undo.callback(self._slab.release)
            if not self._placed:
                self._place()
            options = Options(threads, ways, progress, cancel, verify, fill_image_fd, stored)
            filled = fill(self._extents, self._checkpoint, self._slab, options, image_fd)
            undo.pop_all()
        return LoadStats(filled.nbytes, time.perf_counter() - begin, filled.by_way)

    def release(self) -> int:
        """Give the memory back; the bytes given back. The module's tensors stay, their contents are undefined."""
        return self._slab.release()

    def close(self) -> None:
        """Release for good."""
        self._slab.close()

    def _place(self) -> None:
        for slot in self._slots:
            view = self._slab.view(slot.offset, tuple(slot.tensor.shape), slot.dtype)
            parameter = nn.Parameter(view, requires_grad=False) if isinstance(slot.tensor, nn.Parameter) else None
            for module, leaf in slot.places:
                if parameter is not None:
                    module._parameters[leaf] = parameter
                else:
                    module._buffers[leaf] = view
        self._placed = True


def load_into(
    module: nn.Module,
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    sources: Mapping[str, Sequence[Piece]] | None = None,
    ignore: Collection[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Weights:
    """Fill a module made on the meta device from a checkpoint; see `Weights.bind` and `Weights.load`.

    The module's tensors lie in the memory of the Weights returned: keep it to release and load them again.
    """
    checkpoint = Checkpoint.open(resolve(path_or_hub_id))
    weights = Weights.bind(module, checkpoint, device=torch.device(device), dtype=dtype, sources=sources, ignore=ignore)
    weights.load(threads=threads, progress=progress, cancel=cancel)
    return weights
