"""Blocks that a sequence need not compute: they are in the pool still, or come back from a tier below."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mball.server.engine.blocks import BlockAllocator
from mball.swap.kv_tier import KVTier
from mball.swap.policy import Worth


class Prefixes:
    """Belongs to the thread that steps. `hit_blocks` were in the pool, `restored_blocks` came back to it."""

    def __init__(
        self, allocator: BlockAllocator, tier: KVTier | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.allocator = allocator
        self.tier = tier
        self.hit_blocks = 0
        self.restored_blocks = 0
        self._clock = clock
        if tier is not None:
            allocator.evicted = tier.spill

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the first of these the pool has."""
        return len(self.allocator.shelf.chain(keys))

    def enter(self, keys: Sequence[bytes], num_blocks: int) -> list[int] | None:
        """The first blocks of a sequence that has room for `num_blocks`, whose first ones have these keys: as many as
        there are. None where there is no room for all now."""
        allocator = self.allocator
        found = allocator.shelf.chain(keys)
        idle = sum(held.pins == 0 for held in found)
        if num_blocks - len(found) > allocator.num_free - idle:
            return None
        now_s = self._clock()
        for held in found:
            allocator.shelf.use(held, now_s)
        blocks = [allocator.share(held) for held in found]
        self.hit_blocks += len(blocks)
        if self.tier is not None:
            self.tier.touch(keys[: len(blocks)])
            blocks += self._restored(self.tier, keys, len(blocks))
        return blocks

    def name(self, blocks: list[int], keys: Sequence[bytes], first: int) -> None:
        """A sequence's blocks from `first` on are computed; those of them that others had already are taken instead."""
        for number in range(first, len(keys)):
            parent = keys[number - 1] if number else None
            blocks[number] = self.allocator.name(blocks[number], keys[number], parent, number, self._worth(number))
        if self.tier is not None:
            self.tier.touch(keys[first:])

    def _restored(self, tier: KVTier, keys: Sequence[bytes], first: int) -> list[int]:
        held = tier.hold(keys[first:], first)
        if not held:
            return []
        blocks = self.allocator.allocate(len(held))
        tier.restore(held, blocks)
        self.restored_blocks += len(blocks)
        whole = [*range(first), *blocks]
        self.name(whole, keys[: len(whole)], first)
        return whole[first:]

    def _worth(self, depth: int) -> Worth:
        return Worth(1.0, 1.0, self._clock()) if self.tier is None else self.tier.worth(depth)
