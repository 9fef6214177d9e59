"""Which tokens run in the next step: continuous batching with chunked prefill and preemption. Pure logic.

Sequences are served in the order of their arrival. When blocks run out the youngest running sequence gives its blocks
back and starts again later from its tokens; so the oldest always advances, and every sequence ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mball.server.engine.kv_cache import BlockAllocator

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Sequence(Generic[Owner]):
    """One sequence in the scheduler's eyes.

    `tokens` are prompt and output; the first `num_computed` of them have their keys and values in `blocks`.
    `chunk_limit` bounds the tokens of one step (None: the step's own bound). `owner` is the caller's.
    """

    request_id: str
    tokens: list[int]
    owner: Owner
    chunk_limit: int | None = None
    num_computed: int = 0
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
        self, allocator: BlockAllocator, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.allocator = allocator
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

        Blocks in use move to the front; where they are too many, the youngest sequences wait for room.
        """
        while self.allocator.num_used > num_blocks - 1:
            self._preempt()
        self.allocator.resize(num_blocks)
        moves: list[tuple[int, int]] = []
        for sequence in self.running:
            for place, block in enumerate(sequence.blocks):
                if block >= num_blocks:
                    (sequence.blocks[place],) = self.allocator.allocate(1)
                    self.allocator.free([block])
                    moves.append((block, sequence.blocks[place]))
        return moves

    def finish(self, sequence: Sequence[Owner]) -> None:
        """The sequence ends, wherever it stands; its blocks are free for the next step."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

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
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if self.num_preemptions != preempted or self._blocks_for(len(sequence.tokens)) > self.allocator.num_free:
                break
            self.running.append(self.waiting.popleft())
            count = self._chunk(sequence, budget)
            chunks[sequence] = self._grow(sequence, count)
            budget -= count
        return sorted(chunks.values(), key=lambda chunk: chunk.count > 1)

    def advance(self, chunks: list[Chunk[Owner]]) -> None:
        """The chunks' keys and values are in the cache."""
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.count

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
