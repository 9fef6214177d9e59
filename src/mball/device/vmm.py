"""Device memory that is given back while a process uses the rest of it: a range of addresses that stay, with memory
behind the first part of them.

Views of the range stay valid objects whatever is behind them. What lies past the backed part must not be touched.
"""

from __future__ import annotations

import importlib
import mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from mball.errors import DeviceError, DeviceOutOfMemory
from mball.units import MiB

_CHUNK_BYTES = 16 * MiB
"""Memory is mapped in pieces of this size (a multiple of the device's granularity): a piece goes back as a whole."""


class Range(Protocol):
    """`nbytes` of address space; memory is behind the first `mapped_bytes`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int: ...

    @property
    def granularity(self) -> int:
        """`mapped_bytes` is a multiple of it, or all."""

    def resize(self, nbytes: int) -> None:
        """Has memory behind the first `nbytes`, rounded up, and behind no more. New memory holds anything.

        Whoever used what goes has finished. Raises DeviceOutOfMemory, DeviceError; then it is as before.
        """

    def tensor(self) -> Tensor:
        """All of the range as bytes, (nbytes,). Something is mapped."""

    def close(self) -> None:
        """Gives the memory back. Idempotent."""


def reserve(nbytes: int, device: torch.device, *, huge: bool = False) -> Range:
    """Addresses on the device, no memory yet; on the CPU `huge`: in huge pages where the system has them.

    Raises DeviceError.
    """
    if device.type == "cpu":
        return HostRange(nbytes, huge=huge)
    return CudaRange(nbytes, device) if can_map() else WholeRange(nbytes, device)


def can_map() -> bool:
    """Whether cuda-bindings are here, with which a GPU's memory can be given back by parts."""
    try:
        _driver()
    except ImportError:
        return False
    return True


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


class HostRange:
    """On the CPU: one private anonymous mapping; the kernel brings pages at the first touch."""

    granularity = mmap.PAGESIZE

    def __init__(self, nbytes: int, *, huge: bool = False) -> None:
        self.nbytes = nbytes
        self.mapped_bytes = 0
        try:
            self._mapping = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DeviceError(f"cpu: {nbytes} bytes of address space: {error.strerror}") from None
        if huge:
            self._mapping.madvise(mmap.MADV_HUGEPAGE)

    def resize(self, nbytes: int) -> None:
        mapped = rounded(nbytes, self)
        if mapped < self.mapped_bytes:
            self._mapping.madvise(mmap.MADV_DONTNEED, mapped, self.mapped_bytes - mapped)
        self.mapped_bytes = mapped

    def tensor(self) -> Tensor:
        return torch.frombuffer(self._mapping, dtype=torch.uint8)[: self.nbytes]

    def close(self) -> None:
        # Never unmapped by hand: a view that lives on somewhere keeps the addresses, and reads zeros there.
        self.resize(0)


class CudaRange:
    """On a GPU, by the driver's calls for virtual memory (cuda-bindings).

    The addresses are free again once `close` was called and no tensor of the range lives.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._device = device
        self._driver = driver = _driver()
        self._enter()
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device.index or 0
        self._properties = properties
        access = driver.CUmemAccessDesc()
        access.location = properties.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access = access
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        smallest = int(self._call("cuMemGetAllocationGranularity", properties, least))
        self.granularity = -(-min(_CHUNK_BYTES, max(nbytes, 1)) // smallest) * smallest
        self._space = -(-max(nbytes, 1) // self.granularity) * self.granularity
        self._base = int(self._call("cuMemAddressReserve", self._space, 0, 0, 0))
        self._chunks: list[Any] = []
        self._addresses: _Addresses | None = _Addresses(self)

    @property
    def mapped_bytes(self) -> int:
        return min(self.nbytes, len(self._chunks) * self.granularity)

    def resize(self, nbytes: int) -> None:
        self._enter()
        wanted, before = -(-nbytes // self.granularity), len(self._chunks)
        if wanted < before:
            # What was queued may still read it: the driver does not wait by itself.
            torch.cuda.synchronize(self._device)
        while len(self._chunks) > wanted:
            self._drop()
        try:
            while len(self._chunks) < wanted:
                self._add()
        except DeviceError:
            while len(self._chunks) > before:
                self._drop()
            raise

    def tensor(self) -> Tensor:
        if self._addresses is None or not self._chunks:
            raise DeviceError(f"{self._device}: a range without memory has no tensor")
        return torch.as_tensor(self._addresses, device=self._device)

    def close(self) -> None:
        if self._addresses is not None:
            self.resize(0)
            # The last tensor that refers to the addresses frees them.
            self._addresses = None

    def free_addresses(self, base: int) -> None:
        self._driver.cuMemAddressFree(base, self._space)

    @property
    def address(self) -> int:
        return self._base

    def _add(self) -> None:
        size, at = self.granularity, self._base + len(self._chunks) * self.granularity
        handle = self._create(size)
        try:
            self._call("cuMemMap", at, size, 0, handle, 0)
        except DeviceError:
            self._driver.cuMemRelease(handle)
            raise
        self._chunks.append(handle)
        try:
            self._call("cuMemSetAccess", at, size, [self._access], 1)
        except DeviceError:
            self._drop()
            raise

    def _create(self, size: int) -> Any:
        # Memory that torch has cached and does not use is the process's all the same: it gives it up at need.
        for attempt in (1, 2):
            status, handle = self._driver.cuMemCreate(size, self._properties, 0)
            if status == self._driver.CUresult.CUDA_SUCCESS:
                return handle
            if status != self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise DeviceError(f"{self._device}: cuMemCreate failed: {status!r}")
            if attempt == 1:
                torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        raise DeviceOutOfMemory(str(self._device), size, free_bytes, total_bytes)

    def _drop(self) -> None:
        handle = self._chunks.pop()
        self._call("cuMemUnmap", self._base + len(self._chunks) * self.granularity, self.granularity)
        self._call("cuMemRelease", handle)

    def _enter(self) -> None:
        """Has the device's context, as torch has it, in the calling thread."""
        torch.cuda.set_device(self._device)
        torch.cuda.current_stream(self._device).synchronize()

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"{self._device}: {name} failed: {status!r}")
        return results[0] if results else None


class _Addresses:
    """What tensors of a range refer to; the addresses live as long as it."""

    def __init__(self, owner: CudaRange) -> None:
        self._free = owner.free_addresses
        self._base = owner.address
        self.__cuda_array_interface__ = {
            "shape": (owner.nbytes,),
            "typestr": "|u1",
            "data": (owner.address, False),
            "strides": None,
            "version": 2,
        }

    def __del__(self) -> None:
        self._free(self._base)


class WholeRange:
    """On a GPU without cuda-bindings: all of it or nothing."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = self.granularity = nbytes
        self._device = device
        self._tensor = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def mapped_bytes(self) -> int:
        return self._tensor.numel()

    def resize(self, nbytes: int) -> None:
        if nbytes == 0:
            self._tensor = torch.empty(0, dtype=torch.uint8, device=self._device)
            torch.cuda.empty_cache()
        elif not self.mapped_bytes:
            try:
                self._tensor = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
                raise DeviceOutOfMemory(str(self._device), self.nbytes, free_bytes, total_bytes) from None

    def tensor(self) -> Tensor:
        return self._tensor

    def close(self) -> None:
        self.resize(0)


def rounded(nbytes: int, space: Range) -> int:
    """What is mapped for so many bytes."""
    return min(space.nbytes, -(-nbytes // space.granularity) * space.granularity)
