"""Which tokens run in the next step: continuous batching with chunked prefill and preemption. Pure logic.

Sequences are served in the order of their arrival. When blocks run out the youngest running sequence gives its blocks
back and starts again later from its tokens; so the oldest always advances, and every sequence ends. One whose blocks
are being read from a store is passed over meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mball.server.engine.blocks import BlockAllocator
from mball.server.engine.prefix import Chain
from mball.server.engine.prefixes import Prefixes
from mball.swap.kv_disk import Loading

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Sequence(Generic[Owner]):
    """One sequence in the scheduler's eyes.

    `tokens` are prompt and output; the first `num_computed` of them have their keys and values in `blocks`.
    `chunk_limit` bounds the tokens of one step (None: the step's own bound). `owner` is the caller's. `chain` names its
    blocks (None: it shares none). While `loading` it waits for blocks from a store. `num_cached` tokens were there when
    it first ran (None: it has not).
    """

    request_id: str
    tokens: list[int]
    owner: Owner
    chunk_limit: int | None = None
    chain: Chain | None = None
    loading: Loading | None = None
    num_computed: int = 0
    num_cached: int | None = None
    blocks: list[int] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Owner]):
    """`count` tokens of a sequence from token `start` on. `new_blocks` were given to it for this step."""

    sequence: Sequence[Owner]
    start: int
    count: int
    new_blocks: list[int]

    @property
    def samples(self) -> bool:
        """Whether the last of its tokens is the sequence's last, so that the next one is drawn."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler(Generic[Owner]):
    """Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.allocator = allocator
        self.prefixes = prefixes or Prefixes(allocator)
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.running: list[Sequence[Owner]] = []
        self.waiting: deque[Sequence[Owner]] = deque()
        self.num_preemptions = 0

    def add(self, sequence: Sequence[Owner]) -> None:
        self.waiting.append(sequence)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of that many tokens fits when it is alone."""
        return self._blocks_for(num_tokens) < self.allocator.num_blocks

    def misfits(self) -> list[Sequence[Owner]]:
        """Those that no longer fit even alone, since the pool shrank."""
        if self.allocator.num_blocks == self.allocator.max_blocks:
            return []
        return [sequence for sequence in self.sequences() if not self.fits(len(sequence.tokens))]

    def resize(self, num_blocks: int) -> list[tuple[int, int]]:
        """The pool has that many blocks from now on. Returns which blocks to copy, (from, to) each, between two steps.

        Blocks in use, and kept ones, move to the front; where they are too many, the youngest sequences wait for room.
        """
        while self.allocator.num_used > num_blocks - 1:
            self._preempt()
        moves = self.allocator.resize(num_blocks)
        moved = dict(moves)
        for sequence in self.running:
            sequence.blocks = [moved.get(block, block) for block in sequence.blocks]
        return moves

    def finish(self, sequence: Sequence[Owner], *, keep: bool = True) -> None:
        """The sequence ends, wherever it stands; its blocks are free for the next step. Where they are not kept, nobody
        finds them again."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.loading is not None:
            sequence.loading.wanted = False
        if not keep:
            self.allocator.forget(sequence.blocks)
        self._release(sequence)

    @property
    def busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self.running) or any(sequence.loading is None for sequence in self.waiting)

    def sequences(self) -> Iterator[Sequence[Owner]]:
        """Running, then waiting, each in the order of arrival."""
        yield from self.running
        yield from self.waiting

    def schedule(self) -> list[Chunk[Owner]]:
        """The next step's chunks: decodes first, then prefills. Their blocks are allocated.

        The caller computes them all, then calls `advance`.
        """
        chunks: dict[Sequence[Owner], Chunk[Owner]] = {}
        budget = self.max_num_batched_tokens
        preempted = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                if (sequence.num_pending == 1) is not decoding or sequence not in self.running or budget <= 0:
                    continue
                count = self._chunk(sequence, budget)
                if not self._make_room(sequence, count, chunks):
                    continue
                chunks[sequence] = self._grow(sequence, count)
                budget = self.max_num_batched_tokens - sum(chunk.count for chunk in chunks.values())
        for sequence in [sequence for sequence in self.waiting if sequence.loading is None]:
            full = budget <= 0 or len(self.running) >= self.max_num_seqs or self.num_preemptions != preempted
            if full or not self._enter(sequence):
                break
            count = self._chunk(sequence, budget)
            chunks[sequence] = self._grow(sequence, count)
            budget -= count
        return sorted(chunks.values(), key=lambda chunk: chunk.count > 1)

    def advance(self, chunks: list[Chunk[Owner]]) -> None:
        """The chunks' keys and values are in the cache."""
        for chunk in chunks:
            sequence, first = chunk.sequence, chunk.sequence.num_computed // self.block_size
            sequence.num_computed += chunk.count
            full = sequence.num_computed // self.block_size
            if sequence.chain is not None and full > first:
                self.prefixes.name(sequence.blocks, sequence.chain.keys(sequence.tokens, full), first)

    def reusable(self, sequence: Sequence[Owner]) -> list[bytes]:
        """The keys of the blocks that it need not compute where they are there: at least one token is computed, so that
        there are logits."""
        if sequence.chain is None:
            return []
        return sequence.chain.keys(sequence.tokens, (len(sequence.tokens) - 1) // self.block_size)

    def _enter(self, sequence: Sequence[Owner]) -> bool:
        """It runs from now on, with the blocks that are there; False where there is no room for it."""
        blocks = self.prefixes.enter(self.reusable(sequence), self._blocks_for(len(sequence.tokens)))
        if blocks is None:
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.blocks, sequence.num_computed = blocks, len(blocks) * self.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _chunk(self, sequence: Sequence[Owner], budget: int) -> int:
        return min(sequence.num_pending, budget, sequence.chunk_limit or budget)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _make_room(self, sequence: Sequence[Owner], count: int, chunks: dict[Sequence[Owner], Chunk[Owner]]) -> bool:
        """Free blocks for `count` more tokens, from the youngest first; False where the sequence itself was that."""
        need = self._blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        while need > self.allocator.num_free:
            victim = self._preempt()
            chunks.pop(victim, None)
            if victim is sequence:
                return False
        return True

    def _preempt(self) -> Sequence[Owner]:
        """The youngest gives its blocks back and waits."""
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        return victim

    def _grow(self, sequence: Sequence[Owner], count: int) -> Chunk[Owner]:
        need = self._blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        new_blocks = self.allocator.allocate(max(0, need))
        sequence.blocks += new_blocks
        return Chunk(sequence, sequence.num_computed, count, new_blocks)

    def _release(self, sequence: Sequence[Owner]) -> None:
        self.allocator.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
