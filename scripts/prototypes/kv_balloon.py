"""Physical memory behind rows of vLLM's KV cache goes back to the device, and comes again, while vLLM serves.

Addresses stay, so captured graphs do. A row is the same granule of every layer's tensor: the same blocks in all of
them. Tried by kv_balloon_trial.py; what is to become of it is in docs/design/kv-balloon.md.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mball.errors import DeviceError
from mball.loader import vllm_compat
from mball.units import MiB

driver = importlib.import_module("cuda.bindings.driver")

_LEAST_BYTES = 32 * MiB
_SMALLEST_BYTES = 2 * MiB
"""What the driver maps in multiples of."""


@dataclass
class Layer:
    """One tensor of the KV cache: `handles[row]` is the memory behind its granule, None where there is none."""

    address: int
    sizes: list[int]
    handles: list[Any] = field(default_factory=list)


class Memory:
    """The physical memory behind the KV cache, by rows, in the place of what vLLM's allocator mapped.

    `tensors`: one a layer, blocks first. Raises DeviceError for another layout, and where the driver refuses.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], num_blocks: int) -> None:
        self._cumem = vllm_compat.cumem()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        pages: dict[int, int] = {}
        for tensor in tensors:
            if tensor.shape[0] % num_blocks or tensor.stride(0) != max(tensor.stride()):
                raise DeviceError(f"KV of {tuple(tensor.shape)}, {tensor.stride()}: blocks are not one after another")
            storage = tensor.untyped_storage()
            pages[storage.data_ptr()] = storage.nbytes() // num_blocks
        if len({*pages.values()}) != 1:
            raise DeviceError(f"layers have blocks of different sizes: {sorted({*pages.values()})} bytes")
        page_bytes = next(iter(pages.values()))
        unit = math.lcm(page_bytes, _SMALLEST_BYTES)
        self.granule_bytes = -(-_LEAST_BYTES // unit) * unit
        self.blocks_per_row = self.granule_bytes // page_bytes
        self._whole = {address: self._cumem.allocations()[address].handle for address in pages}
        self.layers = [Layer(address, self._sizes(handle[1])) for address, handle in self._whole.items()]
        self.rows = len(self.layers[0].sizes)
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = torch.cuda.current_device()
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    @property
    def row_bytes(self) -> int:
        return self.granule_bytes * len(self.layers)

    def divide(self) -> None:
        """Granules in the place of one piece a layer. Nothing runs, and nothing is kept in the cache."""
        torch.cuda.synchronize()
        for layer in self.layers:
            self._cumem.unmap(self._whole[layer.address])
            layer.handles = [None] * self.rows
        self.map(range(self.rows))

    def unite(self) -> None:
        """As vLLM's allocator had it. Nothing runs, and nothing is kept in the cache."""
        self.unmap(row for row in range(self.rows) if self.layers[0].handles[row] is not None)
        for handle in self._whole.values():
            self._cumem.map(handle)

    def unmap(self, rows: Iterable[int]) -> None:
        """Waits for what the device was given before, as the driver does not."""
        torch.cuda.synchronize()
        for row in rows:
            for layer in self.layers:
                _call("cuMemUnmap", layer.address + row * self.granule_bytes, layer.sizes[row])
                _call("cuMemRelease", layer.handles[row])
                layer.handles[row] = None

    def map(self, rows: Iterable[int]) -> None:
        """Zeroed: what attention masks has to be a number all the same."""
        # In another thread this is what enters the device's context.
        self._stream.synchronize()
        for row in rows:
            for layer in self.layers:
                address, size = layer.address + row * self.granule_bytes, layer.sizes[row]
                layer.handles[row] = _call("cuMemCreate", size, self._properties, 0)
                _call("cuMemMap", address, size, 0, layer.handles[row], 0)
                _call("cuMemSetAccess", address, size, [self._access], 1)
                _call("cuMemsetD8Async", address, 0, size, driver.CUstream(self._stream.cuda_stream))
        self._stream.synchronize()

    def _sizes(self, nbytes: int) -> list[int]:
        whole, rest = divmod(nbytes, self.granule_bytes)
        return [self.granule_bytes] * whole + [rest] * (rest > 0)


class Balloon:
    """Which rows' blocks are withheld from the scheduler's pool of blocks. Called between its steps.

    `least_blocks`: what one request of the greatest length needs; no less is left.
    """

    def __init__(self, memory: Memory, pool: Any, least_blocks: int) -> None:
        self.taken: list[int] = []
        self.evicted = 0
        self._memory, self._pool, self._least_blocks = memory, pool, least_blocks
        self._wanted: list[Any] = []

    def used(self, row: int) -> int:
        return sum(block.ref_cnt > 0 for block in self._blocks([row]))

    def least_used(self, rows: int) -> list[int]:
        """The last ones where several are. Never the first, which has the block that stands for none."""
        return sorted(range(1, self._memory.rows), key=lambda row: (self.used(row), -row))[:rows]

    def withhold(self, rows: list[int]) -> int:
        """Takes what is free of the rows' blocks, now and at each `settle`; gives how many are still in use."""
        left = (self._memory.rows - len(rows)) * self._memory.blocks_per_row
        if 0 in rows or left < self._least_blocks:
            raise DeviceError(f"{left} blocks of KV would be left, and one request may need {self._least_blocks}")
        self.taken, self.evicted, self._wanted = rows, 0, self._blocks(rows)
        return self.settle()

    def settle(self) -> int:
        used = []
        for block in self._wanted:
            if block.ref_cnt:
                used.append(block)
                continue
            self._pool.free_block_queue.remove(block)
            self.evicted += self._pool._maybe_evict_cached_block(block)
            block.ref_cnt = 1
        self._wanted = used
        return len(used)

    def give_back(self) -> None:
        """The blocks may be used again: there is memory behind them. Before any that has a prefix in it."""
        blocks = self._blocks(self.taken)
        for block in blocks:
            block.ref_cnt = 0
        self._pool.free_block_queue.prepend_n(blocks)
        self.taken = []

    def tidy(self) -> None:
        """Free blocks are used from the first row on; what was used last is no longer kept longest."""
        queue = self._pool.free_block_queue
        free = queue.popleft_n(queue.num_free_blocks)
        queue.append_n(sorted(free, key=lambda block: block.block_id))

    def _blocks(self, rows: Iterable[int]) -> list[Any]:
        size = self._memory.blocks_per_row
        return [block for row in rows for block in self._pool.blocks[row * size : (row + 1) * size]]


def _call(name: str, *arguments: Any) -> Any:
    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{name} failed: {status!r}")
    return results[0] if results else None
