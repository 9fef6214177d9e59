"""The paged KV cache: the memory behind the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mball.device.account import Account
from mball.device.vmm import reserve, rounded
from mball.errors import MballError

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


class KVCache:
    """The pool's memory, one tensor of shape (max_blocks, num_layers, 2, block_size, num_kv_heads, head_dim), of which
    the first `num_blocks` have memory behind them.

    A block is contiguous over all layers: it is spilled with one write, and the pool shrinks by giving back its tail.
    On the CPU its pages are touched as blocks come into use; `release` gives every one back.

    Raises DeviceOutOfMemory; then nothing is held.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        account: Account,
        *,
        max_blocks: int | None = None,
    ) -> None:
        most = num_blocks if max_blocks is None else max_blocks
        self.nbytes = 0
        self.block_size = block_size
        self._block_bytes = geometry.block_bytes(block_size)
        self._account = account
        self._range = reserve(most * self._block_bytes, device)
        shape = (most, geometry.num_layers, 2, block_size, geometry.num_kv_heads, geometry.head_dim)
        self.resize(num_blocks)
        try:
            pool = self._range.tensor().view(geometry.dtype).view(shape)
            if device.type != "cpu":
                pool[NULL_BLOCK].zero_()
        except (MballError, RuntimeError):
            self.release()
            raise
        self.pool = pool
        self.layers = [(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(geometry.num_layers)]

    @property
    def shrinks(self) -> bool:
        """Whether the device takes a part of it back."""
        return self._range.granularity < self._range.nbytes

    def mapped_bytes(self, num_blocks: int) -> int:
        """What so many blocks hold of the device."""
        return rounded(num_blocks * self._block_bytes, self._range)

    def fitting_blocks(self, nbytes: int) -> int:
        """How many blocks hold no more than that of the device."""
        if nbytes >= self._range.nbytes:
            return self._range.nbytes // self._block_bytes
        return nbytes // self._range.granularity * self._range.granularity // self._block_bytes

    def resize(self, num_blocks: int) -> int:
        """Has memory behind that many blocks; returns the bytes given back (fewer than none: taken).

        What the blocks that go hold is lost. Raises DeviceOutOfMemory, DeviceError; then nothing has changed.
        """
        before, after = self.nbytes, self.mapped_bytes(num_blocks)
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
        self.nbytes = after
        return before - after

    def move(self, moves: Iterable[tuple[int, int]]) -> None:
        """Copies blocks, (from, to) each."""
        for source, target in moves:
            self.pool[target].copy_(self.pool[source])

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
        self.layers = []
        self.pool = torch.empty(0)
        self._range.close()
        self._account.give(nbytes)
        return nbytes
