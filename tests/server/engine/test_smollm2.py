"""The same claims on a real model, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mball.server.engine.transformers_adapter import read_config
from tests.server.engine.driving import EngineFor, Run, reference, run_all

TEXTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "A list of prime numbers: 2, 3, 5, 7, 11,",
]


@pytest.fixture(scope="module")
def known(smollm2: Path) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Prompt, greedy tokens and log softmax rows of each text, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [(prompt, *reference(model, prompt, 16)) for prompt in prompts]


def test_tokens_and_logprobs_are_transformers_own_before_and_after_a_swap(
    smollm2: Path, known: list[tuple[list[int], list[int], torch.Tensor]], engine_for: EngineFor
) -> None:
    engine = engine_for(smollm2, dtype="float32", max_num_batched_tokens=8, max_num_seqs=4, block_size=16)
    for _ in range(2):
        runs = run_all(engine, [prompt for prompt, *_ in known], max_tokens=16, logprobs=2)
        for run, (prompt, tokens, rows) in zip(runs, known, strict=True):
            assert run.tokens == tokens
            for step, output in enumerate(run.outputs):
                assert output.logprob is not None
                expected = float(rows[len(prompt) - 1 + step, tokens[step]])
                assert output.logprob.logprob == pytest.approx(expected, abs=1e-3)
        assert Run(engine, "alone", known[2][0], max_tokens=16).wait().tokens == known[2][1]
        engine.demote()
        engine.promote(None)


def test_in_bf16_the_model_still_makes_sense(smollm2: Path, engine_for: EngineFor) -> None:
    engine = engine_for(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    run = Run(engine, "paris", tokenizer(TEXTS[0])["input_ids"], max_tokens=8).wait()
    assert "Paris" in tokenizer.decode(run.tokens)
    assert engine.eos_token_ids == {2}
    assert engine.max_model_len == read_config(engine._spec).max_position_embeddings
