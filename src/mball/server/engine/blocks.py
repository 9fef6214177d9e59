"""Who owns which block of the KV pool: free, in use by one or several sequences, or kept in case it is wanted again."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

from mball.swap.kv_shelf import Held, Shelf
from mball.swap.policy import Worth

_EVICTED_SHARE = 64
"""Where one kept block must go, up to so many-th of the pool go with it: whoever takes those waits for no copy."""


class BlockAllocator:
    """Numbers of blocks, 1 to `num_blocks` - 1, of `max_blocks` that there may be.

    The lowest free number goes first, so the blocks in use gather at the front of the pool and its tail can be given
    back to the device. A block that was named (`name`) is kept on the `shelf` once nobody uses it, and counts as free:
    the least valuable ones go when others are wanted, and `evicted` is told before their blocks are used again.
    """

    def __init__(self, num_blocks: int) -> None:
        self.max_blocks = num_blocks
        self.num_blocks = num_blocks
        self.shelf = Shelf()
        self.evicted: Callable[[Sequence[Held]], None] = lambda held: None
        self._free = list(range(1, num_blocks))
        self._users = [0] * num_blocks
        self._named: dict[int, Held] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + self.shelf.num_unpinned

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` blocks. Raises ValueError where fewer are free: the caller asks `num_free` first."""
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks wanted, {self.num_free} free of {self.num_blocks - 1}")
        if count > len(self._free):
            self.evict(max(count - len(self._free), self.num_blocks // _EVICTED_SHARE))
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """One user less of each. Raises ValueError for a block that is not in use."""
        for block in blocks:
            if not self._users[block]:
                raise ValueError(f"KV block {block} is freed twice")
            self._users[block] -= 1
            if self._users[block]:
                continue
            if (held := self._named.get(block)) is not None:
                self.shelf.unpin(held)
            else:
                heapq.heappush(self._free, block)

    def share(self, held: Held) -> int:
        """One user more of a named block; its number."""
        if not self._users[held.place]:
            self.shelf.pin(held)
        self._users[held.place] += 1
        return held.place

    def name(self, block: int, key: bytes, parent: bytes | None, depth: int, worth: Worth) -> int:
        """A block in use is full. The block to use from now on: where another one of that name is there, that."""
        there = self.shelf.get(key)
        if there is not None and there.place != block:
            self.share(there)
            self.free([block])
            return there.place
        if there is None:
            held = Held(key, block, parent, depth, worth, pins=1)
            self._named[block] = held
            self.shelf.add(held)
        return block

    def forget(self, blocks: Sequence[int]) -> None:
        """The names of these, a sequence's last ones first, as far as nobody else uses or continues them."""
        for block in reversed(blocks):
            held = self._named.get(block)
            if held is None:
                continue
            if self._users[block] > 1 or not self.shelf.is_leaf(held):
                return
            del self._named[block]
            self.shelf.remove(held)

    def clear(self) -> None:
        """Nothing is kept any more. Nobody uses a block."""
        self.shelf.clear()
        self._named.clear()
        self._free = list(range(1, self.num_blocks))

    def resize(self, num_blocks: int) -> list[tuple[int, int]]:
        """From now on there are so many. Returns which blocks to copy, (from, to) each.

        Raises ValueError for fewer than one block beside the null block, more than there may be, or fewer than are in
        use.
        """
        if not 2 <= num_blocks <= self.max_blocks:
            raise ValueError(f"{num_blocks} KV blocks: 2 to {self.max_blocks} are possible")
        if self.num_used > num_blocks - 1:
            raise ValueError(f"{num_blocks} KV blocks: {self.num_used} are in use")
        surplus = self.num_used + self.shelf.num_unpinned - (num_blocks - 1)
        if surplus > 0:
            self.evict(surplus)
        taken = [block for block in range(1, self.num_blocks) if self._users[block] or block in self._named]
        kept = set(taken)
        self.num_blocks = num_blocks
        self._free = [block for block in range(1, num_blocks) if block not in kept]
        return [(block, self._relocate(block)) for block in taken if block >= num_blocks]

    def _relocate(self, block: int) -> int:
        target = heapq.heappop(self._free)
        self._users[target], self._users[block] = self._users[block], 0
        if (held := self._named.pop(block, None)) is not None:
            held.place = target
            self._named[target] = held
        return target

    def evict(self, count: int) -> None:
        """The `count` least valuable of those that are kept go, or all."""
        gone: list[Held] = []
        while len(gone) < count and (held := self.shelf.pop()) is not None:
            del self._named[held.place]
            gone.append(held)
        if gone:
            self.evicted(gone)
        for held in gone:
            heapq.heappush(self._free, held.place)
