"""KV blocks that leave a GPU and come back, beside what it computes: to the bit, in the right order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from mball.device.cuda import CudaRuntime
from mball.swap.kv_arena import Arena
from mball.swap.kv_copies import CudaCopies
from mball.swap.kv_local import LocalBlocks
from mball.swap.store import SwapStore, open_store
from mball.units import KiB, MiB
from tests.server.engine.driving import EngineFor, Run, run_all
from tests.server.engine.test_prefix_engine import ask, forced, prime, with_store
from tests.swap.stores import settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda", 0)
BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * 2 * 4 * 4 * 64 * 2
"""16 tokens of 4 layers, keys and values of 4 heads of 64 numbers in bf16."""
ON_GPU = {"device": "cuda:0", "block_size": BLOCK_TOKENS, "max_num_seqs": 1, "kv_arena_bytes": 64 * MiB}
LONG = [[int(token) for token in prompt] for prompt in torch.randint(3, 500, (4, 600)).tolist()]
BUSY_CYCLES = 200_000_000
"""About a tenth of a second of a GPU's time: whoever does not wait for it is seen to."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("kv")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SwapStore]:
    opened = open_store(settings(tmp_path / "store", size_bytes=64 * MiB, slot_bytes=BLOCK_BYTES))
    yield opened
    opened.close()


def rows(count: int, nbytes: int) -> torch.Tensor:
    return torch.zeros((count, nbytes), dtype=torch.uint8, device=DEVICE)


@pytest.fixture(params=[64 * KiB, 6 * KiB + 512])
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    made = Arena(32 * 64 * KiB, request.param, CudaRuntime(DEVICE))
    made.open(made.prepare(0))
    yield made
    torch.cuda.synchronize()
    made.close()


def test_a_copy_out_waits_for_what_was_computed_and_is_waited_for_by_what_comes(arena: Arena) -> None:
    pool = rows(8, arena.block_bytes)
    copies = CudaCopies(pool, arena.rows, arena.piece_slots)
    for turn in range(1, 4):
        torch.cuda._sleep(BUSY_CYCLES)
        pool[2:5].fill_(turn)
        mark = copies.out([(2, 0), (3, 1), (4, 5)])
        copies.order([2, 3, 4])
        pool[2:5].fill_(99)
        mark.wait()
        for slot in (0, 1, 5):
            assert set(bytes(arena.view(slot))) == {turn}, "bytes of before, or of after"


def test_a_step_waits_for_what_comes_back(arena: Arena) -> None:
    pool = rows(8, arena.block_bytes)
    copies = CudaCopies(pool, arena.rows, arena.piece_slots)
    for turn in range(1, 4):
        for slot in (0, 1, 5):
            arena.view(slot)[:] = bytes([turn]) * arena.block_bytes
        torch.cuda._sleep(BUSY_CYCLES)
        pool.fill_(99)
        mark = copies.back([(2, 0), (3, 1), (4, 5)])
        read = pool.clone()
        pool.fill_(98)
        mark.wait()
        torch.cuda.synchronize()
        assert bool((read[2:5] == turn).all()), "it was read before it was there"
        assert bool((read[5:] == 99).all())
        (found,) = copies.loads()
        assert found[0] == 3 * arena.block_bytes
        assert found[1] > 0


def test_a_block_goes_out_and_another_comes_into_its_place_at_once(arena: Arena) -> None:
    pool = rows(2, arena.block_bytes)
    copies = CudaCopies(pool, arena.rows, arena.piece_slots)
    arena.view(1)[:] = b"\x02" * arena.block_bytes
    torch.cuda._sleep(BUSY_CYCLES)
    pool[1].fill_(1)
    copies.out([(1, 0)])
    copies.order([1])
    copies.back([(1, 1)])
    assert bool((pool[1] == 2).all())
    copies.drain()
    assert set(bytes(arena.view(0))) == {1}


def test_nothing_of_it_is_waited_for_by_the_thread_that_steps(arena: Arena) -> None:
    """All is queued while the device is still busy with what was before."""
    pool = rows(8, arena.block_bytes)
    copies = CudaCopies(pool, arena.rows, arena.piece_slots)
    copies.back([(1, 1)])
    torch.cuda.synchronize()
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(4 * BUSY_CYCLES)
    busy.record()
    first = copies.stamp()
    copies.out([(2, 0), (3, 1)])
    copies.order([2, 3])
    copies.back([(2, 4), (3, 5)])
    pool.fill_(1)
    assert copies.seconds(first, copies.stamp()) is None
    copies.loads()
    assert not busy.query(), "it waited"  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()


def test_evicted_blocks_come_back_to_the_bit(path: Path, engine_for: EngineFor) -> None:
    plain = engine_for(path, **ON_GPU)
    expected = []
    for prompt in LONG:
        prime(plain, prompt)
        expected.append(ask(plain, prompt))
    engine = forced(engine_for(path, **ON_GPU, kv_cache_bytes=44 * BLOCK_BYTES, max_model_len=650))
    for prompt in LONG:
        prime(engine, prompt)
    for prompt, wanted in zip(LONG, expected, strict=True):
        assert ask(engine, prompt) == wanted
    status = engine.status()
    assert status.kv_restored_tokens >= 3 * 37 * BLOCK_TOKENS
    assert (status.kv_failures, status.kv_blocks_free) == (0, status.kv_blocks_total)


def test_prefixes_outlive_demotions_balloons_and_the_engine(
    path: Path, engine_for: EngineFor, store: SwapStore
) -> None:
    first = with_store(engine_for(path, **ON_GPU), store)
    prime(first, LONG[0])
    expected = ask(first, LONG[0])
    first.demote()
    first.promote(None)
    assert ask(first, LONG[0]) == expected
    assert first.status().kv_restored_tokens == 37 * BLOCK_TOKENS
    first.balloon(first.status().spare_bytes)
    first.balloon(0)
    assert ask(first, LONG[0])[0] == expected[0]
    first.close()
    assert first.status().kv_stored_blocks >= 37
    again = with_store(engine_for(path, **ON_GPU), store)
    assert ask(again, LONG[0]) == expected
    assert again.status().kv_restored_tokens == 37 * BLOCK_TOKENS
    assert again.status().kv_failures == 0


def test_many_at_once_in_a_small_pool(path: Path, engine_for: EngineFor, store: SwapStore) -> None:
    options = {**ON_GPU, "max_num_seqs": 4, "dtype": "float32", "max_model_len": 700}
    plain = engine_for(path, **options)
    wanted = [run.tokens for run in run_all(plain, LONG, max_tokens=60)]
    engine = with_store(engine_for(path, **options, kv_cache_bytes=2 * 80 * BLOCK_BYTES), store)
    for _ in range(3):
        assert [run.tokens for run in run_all(engine, LONG, max_tokens=60)] == wanted
    assert engine._scheduler.num_preemptions > 0
    assert engine.status().kv_restored_tokens > 0


def test_the_gate_learns_from_the_device(path: Path, engine_for: EngineFor, store: SwapStore) -> None:
    engine = engine_for(path, **ON_GPU)
    engine.use_block_store(LocalBlocks(store, "worker"))
    for prompt in LONG:
        Run(engine, "r", prompt, max_tokens=4).wait()
    engine.demote()
    engine.promote(None)
    assert ask(engine, LONG[0])
    assert ask(engine, LONG[0])
    gate = engine._tier.gate if engine._tier is not None else None
    assert gate is not None
    assert (gate.recompute_s(0, 512) or 0) > 0
    if engine.status().kv_restored_tokens:
        assert (gate.reload_s("dram", MiB) or 0) > 0
