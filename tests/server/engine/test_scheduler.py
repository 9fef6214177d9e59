"""The scheduler under random traffic: no block leaks or serves two, everyone ends, in the order of arrival."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.server.engine.blocks import BlockAllocator
from mball.server.engine.kv_cache import NULL_BLOCK
from mball.server.engine.scheduler import Chunk, Scheduler, Sequence

Plan = tuple[int, int, int]
"""A sequence's prompt length, output length, and the step in which it arrives."""


class Run:
    """Drives a scheduler with a model that computes nothing, and checks every step."""

    def __init__(self, plans: list[Plan], num_blocks: int, block_size: int, seqs: int, budget: int) -> None:
        self.scheduler: Scheduler[int] = Scheduler(
            BlockAllocator(num_blocks), block_size=block_size, max_num_seqs=seqs, max_num_batched_tokens=budget
        )
        self.plans = plans
        self.final = [prompt + output for prompt, output, _ in plans]
        self.computed: dict[str, list[int]] = {}
        self.finished: list[int] = []
        self.steps = 0

    def arrive(self) -> None:
        for index, (prompt, _, at) in enumerate(self.plans):
            if at == self.steps:
                self.scheduler.add(Sequence(str(index), list(range(prompt)), index))

    def step(self, cancel: set[int]) -> None:
        self.arrive()
        for sequence in list(self.scheduler.sequences()):
            if sequence.owner in cancel:
                self.scheduler.finish(sequence)
                self.finished.append(sequence.owner)
        if self.scheduler.running or self.scheduler.waiting:
            chunks = self.scheduler.schedule()
            assert chunks, "nothing advances: the engine would spin for ever"
            self.check(chunks)
            self.scheduler.advance(chunks)
            for chunk in chunks:
                if chunk.samples:
                    chunk.sequence.tokens.append(0)
                    if len(chunk.sequence.tokens) == self.final[chunk.sequence.owner]:
                        self.scheduler.finish(chunk.sequence)
                        self.finished.append(chunk.sequence.owner)
        self.steps += 1

    def check(self, chunks: list[Chunk[int]]) -> None:
        scheduler = self.scheduler
        assert sum(chunk.count for chunk in chunks) <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert [chunk.count > 1 for chunk in chunks] == sorted(chunk.count > 1 for chunk in chunks)
        held = [block for sequence in scheduler.running for block in sequence.blocks]
        assert len(held) == len(set(held)), "a block serves two"
        assert NULL_BLOCK not in held
        assert len(held) + scheduler.allocator.num_free == scheduler.allocator.num_blocks - 1, "a block leaked"
        for sequence in scheduler.waiting:
            assert sequence.blocks == []
            assert sequence.num_computed == 0
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.count > 0
            assert sequence in scheduler.running
            assert chunk.start == sequence.num_computed
            assert len(sequence.blocks) * scheduler.block_size >= chunk.start + chunk.count
            assert set(chunk.new_blocks) <= set(sequence.blocks)
        owners = [sequence.owner for sequence in scheduler.sequences()]
        assert owners == sorted(owners), "someone overtook in the queue"
        oldest = min(owners)
        assert any(chunk.sequence.owner == oldest for chunk in chunks), "the oldest does not advance"


@settings(max_examples=150, deadline=None)
@given(
    plans=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=8),
    block_size=st.integers(1, 5),
    extra_blocks=st.integers(0, 12),
    seqs=st.integers(1, 5),
    budget=st.integers(1, 16),
    cancelled=st.dictionaries(st.integers(0, 30), st.sets(st.integers(0, 7), max_size=2), max_size=3),
)
def test_every_sequence_ends_and_no_block_is_lost(
    plans: list[Plan], block_size: int, extra_blocks: int, seqs: int, budget: int, cancelled: dict[int, set[int]]
) -> None:
    plans = sorted(plans, key=lambda plan: plan[2])
    longest = max(prompt + output for prompt, output, _ in plans)
    run = Run(plans, 1 + -(-longest // block_size) + extra_blocks, block_size, seqs, budget)
    # Each sequence may be computed anew for every older one's token at worst.
    bound = 40 + sum(run.final) * (1 + len(plans)) * 2
    while len(run.finished) < len(plans) and run.steps < bound:
        run.step(cancelled.get(run.steps, set()) if run.steps > 0 else set())
        for index in cancelled.get(run.steps - 1, ()):  # a sequence cancelled before it came never ends by itself
            assert index >= len(plans) or index in run.finished or plans[index][2] >= run.steps - 1
    assert sorted(run.finished) == list(range(len(plans)))
    assert run.scheduler.allocator.num_free == run.scheduler.allocator.num_blocks - 1


def test_decodes_are_not_held_up_by_a_long_prompt() -> None:
    run = Run([(64, 2, 0), (2, 10, 0)], 100, 4, 4, 8)
    run.scheduler.running = []
    seen = []
    for _ in range(6):
        run.arrive()
        chunks = run.scheduler.schedule()
        run.scheduler.advance(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(0)
                seen.append(chunk.sequence.owner)
        run.steps += 1
    assert seen == [], "the prompts are computed in the order of arrival"
    run = Run([(2, 10, 0), (64, 2, 1)], 100, 4, 4, 8)
    for _ in range(6):
        run.step(set())
    assert len(next(iter(run.scheduler.running)).tokens) == 2 + 6, "a token a step beside the other's prompt"


def test_the_youngest_is_preempted_first() -> None:
    run = Run([(4, 8, 0), (4, 8, 0), (4, 8, 0)], 1 + 7, 2, 3, 32)
    while run.scheduler.num_preemptions == 0:
        run.step(set())
    assert [sequence.owner for sequence in run.scheduler.running] == [0, 1]
    assert [sequence.owner for sequence in run.scheduler.waiting] == [2]


def test_the_allocator_gives_the_lowest_and_refuses_a_second_free() -> None:
    allocator = BlockAllocator(6)
    assert allocator.allocate(3) == [1, 2, 3]
    allocator.free([2, 1])
    assert allocator.allocate(2) == [1, 2]
    with pytest.raises(ValueError, match="3 KV blocks wanted, 2 free of 5"):
        allocator.allocate(3)
    allocator.free([3])
    with pytest.raises(ValueError, match="block 3 is freed twice"):
        allocator.free([3])
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free([NULL_BLOCK])
