"""One stretch of memory for a model's tensors, that can be given back and filled again under the same tensors."""

from __future__ import annotations

import math
import mmap
from typing import Protocol

import torch
from torch import Tensor

from mball.device.account import Account, OpenAccount
from mball.errors import DeviceError, DeviceOutOfMemory
from mball.units import format_bytes


class Slab(Protocol):
    """Memory of `nbytes` on one device. After `release` its views stay valid objects whose contents are undefined."""

    @property
    def nbytes(self) -> int: ...

    @property
    def addressable(self) -> bool:
        """Whether `view` can be called now."""

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor at byte `offset`, a multiple of the element's size."""

    def memory(self) -> Tensor:
        """All of it, one byte an element. Populated memory alone may be written."""

    def populate(self) -> None:
        """Take the memory. Raises DeviceOutOfMemory; then nothing is held."""

    def release(self) -> int:
        """Give the memory back; the bytes given back, 0 where none was held."""

    def close(self) -> None:
        """Release, and forget the slab's own hold on the memory."""


class HostSlab:
    """Private anonymous memory, in huge pages where the system has them.

    The addresses are reserved at once and stay the same for good; memory is behind them from the first write after
    `populate` to `release`. Addresses go when the last tensor does.
    """

    def __init__(self, nbytes: int, account: Account | None = None) -> None:
        """Raises DeviceError where the system has no room for it."""
        self._nbytes = nbytes
        self._account = account or OpenAccount()
        self._held = False
        try:
            self._map = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DeviceError(
                f"cpu: {format_bytes(nbytes)} for weights: {error.strerror}; of a model that generates a part can be "
                "left on the disk (resident_layers: auto)"
            ) from None
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._base = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def addressable(self) -> bool:
        return True

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _view(self._base, offset, shape, dtype)

    def memory(self) -> Tensor:
        return self._base

    def populate(self) -> None:
        if not self._held:
            self._account.take(self._nbytes)
            self._held = True

    def release(self) -> int:
        if not self._held:
            return 0
        self._map.madvise(mmap.MADV_DONTNEED)
        self._account.give(self._nbytes)
        self._held = False
        return self._nbytes

    def close(self) -> None:
        self.release()


class CudaSlab:
    """One allocation on a GPU. It has addresses from the first `populate` on."""

    def __init__(self, nbytes: int, device: torch.device, account: Account | None = None) -> None:
        self._nbytes = nbytes
        self._device = device
        self._account = account or OpenAccount()
        self._held = False
        self._base: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def addressable(self) -> bool:
        return self._base is not None

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _view(self.memory(), offset, shape, dtype)

    def memory(self) -> Tensor:
        if self._base is None:
            raise RuntimeError("the slab has no memory before its first populate()")
        return self._base

    def populate(self) -> None:
        if self._held:
            return
        self._account.take(self._nbytes)
        try:
            if self._base is None:
                self._base = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            else:
                self._base.untyped_storage().resize_(self._nbytes)
        except torch.OutOfMemoryError:
            self._account.give(self._nbytes)
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            raise DeviceOutOfMemory(str(self._device), self._nbytes, free_bytes, total_bytes) from None
        self._held = True

    def release(self) -> int:
        if not self._held or self._base is None:
            return 0
        torch.cuda.synchronize(self._device)
        self._base.untyped_storage().resize_(0)
        torch.cuda.empty_cache()
        self._account.give(self._nbytes)
        self._held = False
        return self._nbytes

    def close(self) -> None:
        self.release()


def open_slab(nbytes: int, device: torch.device, account: Account | None = None) -> Slab:
    """A slab on `cpu` or `cuda`. Raises DeviceError where there is no such device, or no room on the CPU."""
    if device.type != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"{device}: torch {torch.__version__} finds no GPU here (`mball doctor` says what is there)")
    return HostSlab(nbytes, account) if device.type == "cpu" else CudaSlab(nbytes, device, account)


def _view(base: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    if offset < 0 or offset + nbytes > base.numel():
        raise ValueError(f"bytes {offset} to {offset + nbytes} of a slab of {base.numel()}")
    return base[offset : offset + nbytes].view(dtype).view(shape)
