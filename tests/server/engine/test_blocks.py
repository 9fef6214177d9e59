"""Blocks in use, shared, kept and free: none is lost, none is two things at once."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mball.server.engine.blocks import BlockAllocator
from mball.server.engine.prefixes import Prefixes
from mball.swap.kv_shelf import Held


class Kept(RuleBasedStateMachine):
    """Sequences over a tiny alphabet of blocks, so that prefixes meet. What a block holds is modelled beside it."""

    @initialize(num_blocks=st.integers(4, 24))
    def begin(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.allocator.evicted = self.evicted
        self.now_s = 1e6
        self.prefixes = Prefixes(self.allocator, clock=lambda: self.now_s)
        self.content: dict[int, bytes] = {}
        self.live: list[tuple[list[bytes], list[int]]] = []
        self.gone: list[Held] = []

    def evicted(self, gone: list[Held]) -> None:  # type: ignore[override]
        for held in gone:
            assert self.content[held.place] == held.key, "what leaves is not what it is said to be"
            assert all(held.place not in blocks for _, blocks in self.live)
        self.gone += gone

    @rule(text=st.text("ab", min_size=1, max_size=8))
    def enter(self, text: str) -> None:
        """All of its blocks become full."""
        self.now_s += 1
        keys = [text[: n + 1].encode() for n in range(len(text))]
        reusable = keys[: len(keys) - 1]
        blocks = self.prefixes.enter(reusable, len(keys))
        if blocks is None:
            assert len(keys) > self.allocator.num_free - sum(h.pins == 0 for h in self.allocator.shelf.chain(reusable))
            return
        for key, block in zip(keys, blocks, strict=False):
            assert self.content[block] == key, "a sequence was given another's block"
        first = len(blocks)
        new = self.allocator.allocate(len(keys) - first)
        blocks += new
        for block, key in zip(new, keys[first:], strict=True):
            self.content[block] = key
        self.prefixes.name(blocks, keys, first)
        self.live.append((keys, blocks))

    @rule(data=st.data(), keep=st.booleans())
    def end(self, data: st.DataObject, keep: bool) -> None:
        if self.live:
            _, blocks = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
            if not keep:
                self.allocator.forget(blocks)
            self.allocator.free(blocks)

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(2, self.allocator.max_blocks))
        if self.allocator.num_used > size - 1:
            with pytest.raises(ValueError, match="in use"):
                self.allocator.resize(size)
            return
        moves = self.allocator.resize(size)
        assert all(source >= size > target > 0 for source, target in moves)
        moved = {source: self.content[source] for source, _ in moves}
        for source, target in moves:
            self.content[target] = moved[source]
        place = dict(moves)
        self.live = [(keys, [place.get(block, block) for block in blocks]) for keys, blocks in self.live]

    @invariant()
    def all_is_accounted_for(self) -> None:
        if not hasattr(self, "allocator"):
            return
        allocator = self.allocator
        used = {block for _, blocks in self.live for block in blocks}
        kept = {held.place for held in allocator.shelf}
        idle = {held.place for held in allocator.shelf if held.pins == 0}
        free = set(allocator._free)
        assert used.isdisjoint(free)
        assert kept.isdisjoint(free)
        assert idle == kept - used
        assert used | kept | free == set(range(1, allocator.num_blocks))
        assert len(free) == len(allocator._free)
        assert allocator.num_used == len(used)
        for held in allocator.shelf:
            assert self.content[held.place] == held.key
            assert held.parent is None or allocator.shelf.get(held.parent) is not None, "a suffix without its prefix"
        for keys, blocks in self.live:
            assert [self.content[block] for block in blocks] == keys


TestKept = Kept.TestCase


def test_all_that_counts_as_free_can_be_had() -> None:
    allocator = BlockAllocator(10)
    prefixes = Prefixes(allocator)
    keys = [bytes([n]) for n in range(9)]
    blocks = allocator.allocate(9)
    prefixes.name(blocks, keys, 0)
    allocator.free(blocks)
    assert (allocator.num_free, allocator.num_used) == (9, 0)
    gone: list[Held] = []
    allocator.evicted = gone.extend
    assert len(allocator.allocate(9)) == 9
    assert [held.key for held in gone] == keys[::-1], "suffixes go first"


def test_a_block_that_another_had_already_is_shared() -> None:
    allocator = BlockAllocator(10)
    prefixes = Prefixes(allocator)
    first, second = allocator.allocate(2), allocator.allocate(2)
    prefixes.name(first, [b"a", b"ab"], 0)
    prefixes.name(second, [b"a", b"ac"], 0)
    assert second[0] == first[0]
    assert allocator.num_used == 3
    allocator.free(first)
    allocator.free(second)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free([first[0]])
    allocator.clear()
    assert allocator.num_free == len(allocator._free) == 9
