"""The engine's claims on a GPU, in fp32."""

from __future__ import annotations

import pytest
import torch

from tests.server.engine.conftest import CONFIGS
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference, run_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MIXED = prompts(6)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_reference_s_before_and_after_a_swap(
    name: str, model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir(name)
    engine = engine_for(path, device="cuda:0", max_num_batched_tokens=16)
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in MIXED]
    assert [run.tokens for run in run_all(engine, MIXED)] == expected
    engine.demote()
    engine.promote(None)
    assert [run.tokens for run in run_all(engine, MIXED)] == expected


def test_seeded_sampling_is_the_same_alone_in_a_batch_and_after_a_swap(
    model_dir: ModelDir, engine_for: EngineFor
) -> None:
    options = {"temperature": [1.0, 0.7, 1.5, 0.0, 1.0, 1.2], "top_p": [1.0, 0.9, 1.0, 1.0, 0.5, 0.8]}
    engine = engine_for(model_dir("qwen3"), device="cuda:0")
    batch = [run.tokens for run in run_all(engine, MIXED, **options)]
    for index, prompt in enumerate(MIXED):
        own = {key: value[index] for key, value in options.items()}
        assert Run(engine, "alone", prompt, **own).wait().tokens == batch[index]
    engine.demote()
    engine.promote(None)
    assert [run.tokens for run in run_all(engine, MIXED, **options)] == batch


def test_no_step_plans_an_attention_anew(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine_for(model_dir("llama"), device="cuda:0")
    query = torch.zeros(1, 8, 4, 64, dtype=torch.bfloat16, device="cuda")
    with torch.profiler.profile(acc_events=True) as profile:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert not [event.name for event in profile.events() if "cudnn" in event.name]


def test_demote_gives_the_memory_back(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"), device="cuda:0", promote=False)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        promoted = engine.promote(None)
        run_all(engine, MIXED)
        # The KV pool is the driver's own where cuda-bindings are, not torch's.
        assert torch.cuda.memory_allocated() - before >= promoted.weights_bytes
        engine.demote()
        # What stays is cuBLAS's workspace, which belongs to the context.
        assert torch.cuda.memory_allocated() - before < 64 << 20
