"""The weights of one module: laid out in one slab, loaded into it, given back, loaded again."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from mball.device.account import Account
from mball.errors import TensorMismatch
from mball.loader.binding import Piece, Slot, extents_of, first_byte, keep_other_buffers, match
from mball.loader.checkpoint import Checkpoint
from mball.loader.manifest import Manifest
from mball.loader.plan import Extent, aligned, chunked
from mball.loader.reader import Progress, Source, read
from mball.loader.slab import Slab, open_slab

__all__ = ["LoadStats", "Piece", "Weights"]


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Bytes read and seconds taken."""

    bytes: int
    seconds: float


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
        slots, defects = match(module, checkpoint, dtype, sources or {}, ignore)
        defects += keep_other_buffers(module, {id(slot.tensor) for slot in slots}, device)
        if defects:
            raise TensorMismatch("; ".join(defects), file=str(checkpoint.path))
        slots.sort(key=lambda slot: first_byte(slot, checkpoint))
        nbytes = 0
        for slot in slots:
            slot.offset = aligned(nbytes)
            nbytes = slot.offset + slot.nbytes
        extents = chunked(extent for slot in slots for extent in extents_of(slot, checkpoint))
        return cls(checkpoint, open_slab(nbytes, device, account), slots, extents)

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take on the device while loaded."""
        return self._slab.nbytes

    def load(
        self,
        image_fd: int | None = None,
        *,
        threads: int = 2,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        verify: Manifest | None = None,
    ) -> LoadStats:
        """Fill the module's tensors, from the source image where one is given, else from the shards.

        With `verify`, the checkpoint's manifest, every byte is checked on the way in.

        Raises ReadError, DigestMismatch, Cancelled, DeviceOutOfMemory, TimeoutError; after an error nothing is held on
        the device.
        """
        begin = time.perf_counter()
        with ExitStack() as undo:
            self._slab.populate()
            undo.callback(self._slab.release)
            if not self._placed:
                self._place()
            source = Source(self._checkpoint, image_fd)
            nbytes = read(
                self._extents,
                source,
                self._slab.lane,
                threads=threads,
                progress=progress,
                cancel=cancel,
                verify=verify.verifier(self._checkpoint) if verify is not None else None,
            )
            undo.pop_all()
        return LoadStats(nbytes, time.perf_counter() - begin)

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
