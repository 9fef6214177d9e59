"""The KV pool while its model comes, goes and serves: its memory, and what of it is given up for a balloon."""

from __future__ import annotations

from typing import Any

import torch

from mball.device.account import Account
from mball.errors import MballError, TransitionError
from mball.memory.spec import WorkerSpec
from mball.server.engine import balloon as balloons
from mball.server.engine.kv_cache import KVCache, KVGeometry
from mball.server.engine.resident import ResidentWeights
from mball.server.engine.scheduler import Scheduler
from mball.units import format_bytes

RETIRE_S = 2.0
"""The longest that KV is copied out of a pool that goes."""


class Pool:
    """`cache` is None while the model is off its device. What changes it runs between two steps, or while there are
    none."""

    def __init__(
        self,
        spec: WorkerSpec,
        geometry: KVGeometry,
        account: Account,
        device: torch.device,
        weights: ResidentWeights,
        scheduler: Scheduler[Any],
        max_model_len: int,
    ) -> None:
        self.cache: KVCache | None = None
        self._spec = spec
        self._geometry = geometry
        self._account = account
        self._device = device
        self._weights = weights
        self._scheduler = scheduler
        self._allocator = scheduler.allocator
        self._longest = -(-max_model_len // spec.block_size)

    def open(self) -> KVCache:
        """Raises DeviceOutOfMemory, and what else KVCache does."""
        self.cache = cache = KVCache(
            self._geometry,
            self._allocator.num_blocks,
            self._spec.block_size,
            self._device,
            self._account,
            max_blocks=self._allocator.max_blocks,
        )
        if (tier := self._scheduler.prefixes.tier) is not None:
            tier.attach(cache.pool)
        return cache

    def release(self) -> int:
        """Its memory goes back, after what is kept in it went to the tier below, where there is one. No sequence is
        there. Returns the bytes given back."""
        cache, self.cache = self.cache, None
        if cache is None:
            return 0
        if (tier := self._scheduler.prefixes.tier) is not None:
            tier.retire(list(self._allocator.shelf), RETIRE_S)
        self._allocator.clear()
        return cache.release()

    @property
    def whole_bytes(self) -> int:
        """Of the whole pool, nothing given up."""
        return self._allocator.max_blocks * self._block_bytes

    @property
    def held_bytes(self) -> int:
        """What it has of the device; what it will have, while it is off."""
        cache = self.cache
        return self._allocator.num_blocks * self._block_bytes if cache is None else cache.nbytes

    @property
    def spare_bytes(self) -> int:
        """What nobody would miss: kept blocks can go."""
        cache = self.cache
        if cache is None or not cache.shrinks:
            return 0
        return max(0, cache.nbytes - cache.mapped_bytes(1 + max(self._longest, self._allocator.num_used)))

    @property
    def ballooned_bytes(self) -> int:
        return self.whole_bytes - self.held_bytes + self._weights.ballooned_bytes

    def give(self, nbytes: int) -> tuple[int, int]:
        """How many blocks and cells are left where pool and layers give up so much. Raises TransitionError."""
        share = self._share(nbytes)
        return self._blocks_without(share.kv_bytes, nbytes), share.cells

    def squeeze(self, num_blocks: int, cells: int, *, gently: bool) -> None:
        """What gives memory up goes first, so that what takes some back finds it. Raises TransitionError,
        DeviceOutOfMemory; then nothing has changed."""
        layers = self._weights.streamed
        if layers is None or cells == layers.cells:
            self._resize(num_blocks, gently=gently)
            return
        before, blocks_before = layers.cells, self._allocator.num_blocks
        if cells < before:
            if gently:
                raise TransitionError(f"{self._spec.model}: its weights are in use")
            layers.resize(cells)
            try:
                self._resize(num_blocks, gently=False)
            except MballError:
                layers.resize(before)
                raise
            return
        self._resize(num_blocks, gently=gently)
        try:
            layers.resize(cells)
        except MballError:
            self._resize(blocks_before, gently=False)
            raise

    @property
    def _block_bytes(self) -> int:
        return self._geometry.block_bytes(self._spec.block_size)

    def _share(self, nbytes: int) -> balloons.Give:
        layers, cache = self._weights.streamed, self.cache
        if layers is None:
            return balloons.Give(nbytes, 0)
        longest = 1 + self._longest
        kept = longest * self._block_bytes if cache is None else cache.mapped_bytes(longest)
        return balloons.share(
            nbytes,
            easy_bytes=max(0, self.whole_bytes - kept) if cache is None or cache.shrinks else 0,
            most_cells=layers.max_cells,
            least_cells=layers.least_cells,
            cell_bytes=layers.bytes_of,
        )

    def _blocks_without(self, nbytes: int, asked_bytes: int) -> int:
        """How many blocks are left where the pool gives up `nbytes` of `asked_bytes`."""
        cache, left = self.cache, self.whole_bytes - nbytes
        if cache is not None and not cache.shrinks and nbytes > 0:
            raise TransitionError(f"{self._spec.model}: its KV pool can't shrink: install cuda-bindings")
        blocks = left // self._block_bytes if cache is None else cache.fitting_blocks(left)
        if asked_bytes < 0 or blocks < 2:
            least = 2 * self._block_bytes if cache is None else cache.mapped_bytes(2)
            layers = self._weights.streamed
            streamed = 0 if layers is None else layers.bytes_of(layers.max_cells) - layers.bytes_of(layers.least_cells)
            most = format_bytes(max(0, self.whole_bytes - least) + streamed)
            whose = "its KV pool" if layers is None else "its KV pool and its weights"
            raise TransitionError(
                f"{self._spec.model}: {format_bytes(asked_bytes)} for the balloon; {whose} can give up {most} at most"
            )
        return blocks

    def _resize(self, num_blocks: int, *, gently: bool) -> None:
        cache, allocator = self.cache, self._allocator
        if num_blocks >= allocator.num_blocks:
            if cache is not None:
                cache.resize(num_blocks)
            self._scheduler.resize(num_blocks)
            return
        if gently and cache is not None:
            spare = self.spare_bytes
            if cache.nbytes - cache.mapped_bytes(num_blocks) > spare:
                raise TransitionError(f"{self._spec.model}: {format_bytes(spare)} of its KV pool are not in use")
        moves = self._scheduler.resize(num_blocks)
        if cache is not None:
            if (tier := self._scheduler.prefixes.tier) is not None:
                tier.order(target for _, target in moves)
            cache.move(moves)
            cache.resize(num_blocks)
