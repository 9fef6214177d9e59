"""A model's weights on its device: one part that stays, and behind it equal cells, each with room for one layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mball.device.account import Account
from mball.device.vmm import Range, can_map, reserve, rounded
from mball.errors import DeviceError, MballError


class Cells:
    """A slab (mball.loader.slab) of `rest_bytes` and up to `max_cells` cells, the last of which can be given back.

    Addresses stay the same for good. A view of what was given back must not be touched.
    """

    def __init__(
        self, rest_bytes: int, cell_bytes: int, max_cells: int, device: torch.device, account: Account
    ) -> None:
        """Raises DeviceError where the device can't give memory back by parts."""
        self.rest_bytes = rest_bytes
        self.cell_bytes = cell_bytes
        self.max_cells = max_cells
        self.cells = max_cells
        self._account = account
        self._taken = 0
        if device.type == "cuda" and not can_map():
            raise DeviceError(f"{device}: layers are streamed with cuda-bindings alone: pip install cuda-bindings")
        self._range: Range = reserve(rest_bytes + max_cells * cell_bytes, device, huge=True)
        self._memory: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Held now, or what a `populate` takes."""
        return self._taken or self.bytes_of(self.cells)

    def bytes_of(self, cells: int) -> int:
        return rounded(self.rest_bytes + cells * self.cell_bytes, self._range)

    @property
    def held(self) -> bool:
        return self._taken > 0

    @property
    def addressable(self) -> bool:
        return self._memory is not None

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        return self.memory()[offset : offset + nbytes].view(dtype).view(shape)

    def memory(self) -> Tensor:
        if self._memory is None:
            raise RuntimeError("there is no memory before the first populate()")
        return self._memory

    def offset(self, cell: int) -> int:
        return self.rest_bytes + cell * self.cell_bytes

    def cell(self, cell: int) -> Tensor:
        """Its bytes."""
        at = self.offset(cell)
        return self.memory()[at : at + self.cell_bytes]

    def populate(self) -> None:
        """Raises DeviceOutOfMemory; then nothing is held."""
        if not self.held:
            self._hold(self.cells)
        if self._memory is None:
            self._memory = self._range.tensor()

    def resize(self, cells: int) -> None:
        """Has that many cells from now on, or from the next `populate` on. What the cells that go hold is lost.

        Raises DeviceOutOfMemory, DeviceError; then nothing has changed.
        """
        if self.held:
            self._hold(cells)
        self.cells = cells

    def move(self, source: int, target: int) -> None:
        self.cell(target).copy_(self.cell(source))

    def release(self) -> int:
        taken, self._taken = self._taken, 0
        if taken:
            self._range.resize(0)
            self._account.give(taken)
        return taken

    def close(self) -> None:
        self.release()
        self._memory = None
        self._range.close()

    def _hold(self, cells: int) -> None:
        before, after = self._taken, self.bytes_of(cells)
        if after > before:
            self._account.take(after - before)
        try:
            self._range.resize(after)
        except (MballError, RuntimeError, OSError):
            if after > before:
                self._account.give(after - before)
            raise
        if after < before:
            self._account.give(before - after)
        self._taken = after
