"""The paged KV cache: who owns which block, and the memory behind the blocks."""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mball.device.account import Account
from mball.errors import DeviceOutOfMemory

NULL_BLOCK = 0
"""Never given to a sequence and always zero: what the shorter rows of a padded gather read."""


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one token's keys and values in a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def block_bytes(self, block_size: int) -> int:
        return block_size * self.token_bytes


class BlockAllocator:
    """Numbers of free blocks, 1 to `num_blocks` - 1.

    The lowest free number goes first, so the blocks in use gather at the front of the pool and its tail can be given
    back to the device.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(1, num_blocks))
        self._used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks. Raises ValueError where fewer are free: the caller asks `num_free` first."""
        if count > len(self._free):
            raise ValueError(f"{count} KV blocks wanted, {len(self._free)} free of {self.num_blocks - 1}")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._used[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Raises ValueError for a block that is not in use."""
        for block in blocks:
            if not self._used[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._used[block] = 0
            heapq.heappush(self._free, block)


class KVCache:
    """The pool's memory, one tensor of shape (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim).

    A block is contiguous over all layers: it is spilled with one write, and the pool shrinks by giving back its tail.
    On the CPU the pool is an anonymous mapping of its own, touched as blocks come into use, so that `release` gives
    every page back whatever the allocator does.

    Raises DeviceOutOfMemory; then nothing is held.
    """

    def __init__(
        self, geometry: KVGeometry, num_blocks: int, block_size: int, device: torch.device, account: Account
    ) -> None:
        self.nbytes = num_blocks * geometry.block_bytes(block_size)
        self.block_size = block_size
        self._account = account
        self._mapping: mmap.mmap | None = None
        shape = (num_blocks, geometry.num_layers, 2, block_size, geometry.num_kv_heads, geometry.head_dim)
        account.take(self.nbytes)
        try:
            if device.type == "cpu":
                self._mapping = mmap.mmap(-1, self.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                pool = torch.frombuffer(self._mapping, dtype=geometry.dtype).view(shape)
            else:
                pool = torch.zeros(shape, dtype=geometry.dtype, device=device)
        except torch.OutOfMemoryError:
            account.give(self.nbytes)
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            raise DeviceOutOfMemory(str(device), self.nbytes, free_bytes, total_bytes) from None
        except (OSError, RuntimeError):
            account.give(self.nbytes)
            raise
        self.pool = pool
        self.layers = [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(geometry.num_layers)]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks before their first use.

        Attention masks what lies past a sequence's end, but 0 × NaN is NaN: a former owner's values must not be there.
        """
        for block in blocks:
            self.pool[block].zero_()

    def release(self) -> int:
        """Give the memory back; the cache is unusable after it. Idempotent. Returns the bytes given back."""
        nbytes, self.nbytes = self.nbytes, 0
        if nbytes == 0:
            return 0
        self.layers.clear()
        self.pool = torch.empty(0)
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            # Never closed: a view that lives on somewhere keeps the addresses, and reads zeros there.
            mapping.madvise(mmap.MADV_DONTNEED)
        else:
            torch.cuda.empty_cache()
        self._account.give(nbytes)
        return nbytes
