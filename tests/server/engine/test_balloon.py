"""The KV pool gives memory back while the engine serves, and no token changes."""

from __future__ import annotations

import threading
import time
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mball.device.account import OpenAccount
from mball.errors import DeviceOutOfMemory, TransitionError
from mball.server.engine.blocks import BlockAllocator
from mball.server.engine.kv_cache import KVCache, KVGeometry
from mball.server.engine.scheduler import Scheduler, Sequence
from mball.units import MiB
from tests.device.test_vmm import resident_bytes
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference, run_all
from tests.server.engine.test_engine_life import BLOCK_BYTES, SmallDevice

MIXED = prompts(6)
PAGE = 4096


def test_the_pools_tail_goes_and_comes_back() -> None:
    geometry = KVGeometry(num_layers=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    kv = KVCache(geometry, 1024, 16, torch.device("cpu"), OpenAccount())
    kv.pool.fill_(1.0)
    whole, address = kv.nbytes, kv.pool.data_ptr()
    assert resident_bytes(address, whole) == whole
    given_back = kv.resize(100)
    assert given_back == whole - kv.nbytes > 50 * MiB
    assert resident_bytes(address, whole) == kv.nbytes == 100 * whole // 1024
    kv.move([(99, 3)])
    kv.clear([99])
    assert bool((kv.pool[3] == 1).all())
    assert float(kv.pool[99].sum()) == 0
    assert kv.resize(1024) == -given_back
    assert kv.release() == whole


@settings(deadline=None)
@given(st.data())
def test_blocks_in_use_move_to_the_front_and_belong_to_one_each(data: st.DataObject) -> None:
    total = data.draw(st.integers(4, 40))
    scheduler: Scheduler[None] = Scheduler(
        BlockAllocator(total), block_size=2, max_num_seqs=6, max_num_batched_tokens=8
    )
    content: dict[int, tuple[int, int]] = {}
    sequences: list[Sequence[None]] = []
    for number in range(data.draw(st.integers(1, 6))):
        sequences.append(Sequence(str(number), [0] * data.draw(st.integers(1, (total - 1) * 2)), None))
        scheduler.add(sequences[-1])
    for _ in range(data.draw(st.integers(1, 12))):
        for sequence in scheduler.misfits():
            scheduler.finish(sequence)
        chunks = scheduler.schedule()
        for chunk in chunks:
            owner = sequences.index(chunk.sequence)
            for token in range(chunk.start, chunk.start + chunk.count):
                content[chunk.sequence.blocks[token // 2]] = (owner, token // 2)
        scheduler.advance(chunks)
        size = data.draw(st.integers(2, total))
        before = scheduler.allocator.num_used
        moves = scheduler.resize(size)
        for source, target in moves:
            assert source >= size > target > 0
            content[target] = content[source]
        used = [block for sequence in scheduler.running for block in sequence.blocks]
        assert len(used) == len(set(used)) == scheduler.allocator.num_used <= min(before, size - 1)
        assert all(0 < block < size for block in used)
        assert scheduler.allocator.num_free == size - 1 - len(used)
        for sequence in scheduler.running:
            filled = -(-sequence.num_computed // 2)
            owner = sequences.index(sequence)
            assert [content[block] for block in sequence.blocks[:filled]] == [(owner, i) for i in range(filled)]


def test_no_token_changes_while_the_balloon_goes_in_and_out(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    blocks = 400
    engine = engine_for(path, kv_cache_bytes=blocks * BLOCK_BYTES, max_num_seqs=4)
    expected = [reference(oracle(path), prompt, 100)[0] for prompt in MIXED]
    runs = [Run(engine, f"r{index}", prompt, max_tokens=100) for index, prompt in enumerate(MIXED)]
    sizes = cycle([0, 340, 200, 320, 0, 280, 345])
    changes = preempted = 0
    while not all(run.done.is_set() for run in runs):
        engine.balloon(next(sizes) * BLOCK_BYTES)
        changes += 1
        preempted = engine._scheduler.num_preemptions
        runs[-1].done.wait(0.01)
    assert [run.wait().tokens for run in runs] == expected
    assert changes > 5
    assert preempted > 0, "nobody ever had to wait for room"
    engine.balloon(0)
    status = engine.status()
    assert (status.ballooned_bytes, status.kv_blocks_free) == (0, blocks - 1)


def test_a_pool_that_cannot_hold_a_sequence_says_so_and_serves_the_others(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = engine_for(path, kv_cache_bytes=200 * BLOCK_BYTES)
    engine.balloon(190 * BLOCK_BYTES)
    left = engine.status().kv_blocks_total
    assert 2 <= left <= 9
    large = Run(engine, "large", [5] * 60)
    growing = Run(engine, "growing", [7] * 3, max_tokens=100)
    small = Run(engine, "small", MIXED[0][:3], max_tokens=4)
    assert large.wait().reason == growing.wait().reason == "error"
    assert "mball balloon tiny 0" in (large.error or "")
    assert len(growing.tokens) > 0
    assert small.wait().tokens == reference(oracle(path), MIXED[0][:3], 4)[0]
    engine.balloon(0)
    assert Run(engine, "again", [5] * 60).wait().tokens == reference(oracle(path), [5] * 60, 12)[0]


def test_a_gentle_balloon_takes_only_what_nobody_uses(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"), kv_cache_bytes=400 * BLOCK_BYTES, max_model_len=64)
    spare = engine.status().spare_bytes
    longest = 1 + 64 // 4
    assert spare == 400 * BLOCK_BYTES - -(-longest * BLOCK_BYTES // PAGE) * PAGE
    with pytest.raises(TransitionError, match="not in use"):
        engine.balloon(spare + PAGE, gently=True)
    assert engine.status().ballooned_bytes == 0
    ballooned = engine.balloon(spare, gently=True)
    assert ballooned.ballooned_bytes == engine.status().ballooned_bytes == spare
    assert ballooned.kv_bytes == engine.status().kv_bytes
    assert engine.status().spare_bytes == 0
    assert Run(engine, "longest", [5] * 50, max_tokens=14).wait().reason == "length"


def test_the_account_follows_and_refuses(model_dir: ModelDir, engine_for: EngineFor) -> None:
    device = SmallDevice(1 << 40)
    engine = engine_for(model_dir("llama"), kv_cache_bytes=400 * BLOCK_BYTES, account=device)
    whole = device.taken_bytes
    engine.balloon(100 * BLOCK_BYTES)
    ballooned = engine.status().ballooned_bytes
    assert 100 * BLOCK_BYTES <= ballooned < 100 * BLOCK_BYTES + PAGE + BLOCK_BYTES
    assert device.taken_bytes == whole - ballooned
    device.total_bytes = device.taken_bytes + PAGE
    with pytest.raises(DeviceOutOfMemory):
        engine.balloon(0)
    assert engine.status().ballooned_bytes == ballooned
    assert device.taken_bytes == whole - ballooned
    assert Run(engine, "on", MIXED[0]).wait().reason == "length"
    assert engine.demote().released_bytes == whole - ballooned
    assert device.taken_bytes == 0
    engine.balloon(200 * BLOCK_BYTES)
    device.total_bytes = 1 << 40
    engine.promote(None)
    assert engine.status().ballooned_bytes >= 200 * BLOCK_BYTES
    assert device.taken_bytes == whole - engine.status().ballooned_bytes
    engine.balloon(0)
    assert device.taken_bytes == whole


@pytest.mark.parametrize("nbytes", [-1, 1 << 40])
def test_what_cannot_be_given_up_is_refused(model_dir: ModelDir, engine_for: EngineFor, nbytes: int) -> None:
    engine = engine_for(model_dir("llama"))
    with pytest.raises(TransitionError, match="at most"):
        engine.balloon(nbytes)
    assert engine.status().ballooned_bytes == 0


def test_a_balloon_meets_the_end_of_its_engine(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"))
    Run(engine, "long", MIXED[0], max_tokens=200)
    stop = threading.Event()

    def balloon() -> None:
        sizes = cycle([0, 50])
        while not stop.is_set():
            try:
                engine.balloon(next(sizes) * BLOCK_BYTES)
            except TransitionError:
                return

    thread = threading.Thread(target=balloon)
    thread.start()
    time.sleep(0.05)
    engine.close()
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def test_threads_change_between_steps(model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor) -> None:
    path = model_dir("llama")
    engine = engine_for(path, threads=2)
    seen: list[int] = []
    engine._weights.module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    run_all(engine, MIXED[:1])
    engine.set_threads(1)
    assert run_all(engine, MIXED[:1])[0].tokens == reference(oracle(path), MIXED[0], 12)[0]
    assert (seen[0], seen[-1]) == (2, 1)
