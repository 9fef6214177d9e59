"""What is promised beforehand is what is taken."""

from __future__ import annotations

from mball.memory.spec import WorkerSpec
from mball.server.engine import footprint
from tests.server.engine.driving import EngineFor, ModelDir, Run


def test_weights_and_kv_are_what_a_promotion_takes(model_dir: ModelDir, engine_for: EngineFor) -> None:
    for name in ("llama", "qwen3_moe", "gemma2_softcap"):
        path = model_dir(name)
        engine = engine_for(path, promote=False)
        promoted = engine.promote(None)
        told = footprint(WorkerSpec("tiny", str(path), "", "cpu", block_size=4, threads=1))
        assert told.kv_bytes == promoted.kv_bytes
        # The loader begins each tensor on a boundary of its own.
        assert told.weights_bytes <= promoted.weights_bytes < 1.02 * told.weights_bytes + 4096
        assert told.activation_bytes > 0
        assert told.total_bytes == told.weights_bytes + told.kv_bytes + told.activation_bytes


def test_the_pool_s_size_is_the_operator_s_where_given_and_bounds_the_longest_sequence(
    model_dir: ModelDir, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    block_bytes = 4 * 3 * 2 * 2 * 8 * 4
    engine = engine_for(path, kv_cache_bytes=11 * block_bytes + 5)
    assert engine.status().kv_blocks_total == 10
    assert engine.max_model_len == 40
    run = Run(engine, "long", [5] * 30, max_tokens=100).wait()
    assert (len(run.tokens), run.reason) == (10, "length")
    told = footprint(WorkerSpec("tiny", str(path), "", "cpu", dtype="bfloat16", max_num_seqs=2, max_model_len=100))
    assert told.kv_bytes == (1 + 2 * 7) * 16 * 3 * 2 * 2 * 8 * 2
