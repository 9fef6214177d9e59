"""The engine's answers against transformers' plain forward pass, in fp32."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from mball.errors import Cancelled
from tests.server.engine.conftest import CONFIGS
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference, run_all

MIXED = prompts(6)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_reference_s_alone_and_in_a_batch_of_mixed_lengths(
    name: str, model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir(name)
    engine = engine_for(path, max_num_batched_tokens=16)  # prompts come in several chunks
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in MIXED]
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "the model is degenerate: the test is blind"
    assert [run.tokens for run in run_all(engine, MIXED)] == expected
    for prompt, tokens in zip(MIXED[:3], expected[:3], strict=True):
        assert Run(engine, "alone", prompt).wait().tokens == tokens
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total


@pytest.mark.parametrize("name", ["llama", "gemma2_softcap"])
def test_logprobs_are_those_of_the_raw_logits(
    name: str, model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir(name)
    engine = engine_for(path, max_num_batched_tokens=16)
    # Neither temperature nor penalties nor bias show in the log probabilities.
    options = {"temperature": 1.3, "presence_penalty": 0.4, "logit_bias": {7: 3.0}, "prompt_logprobs": True}
    for run, prompt in zip(run_all(engine, MIXED, logprobs=3, **options), MIXED, strict=True):
        tokens = torch.tensor([[*prompt, *run.tokens]])
        with torch.inference_mode():
            rows = oracle(path)(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        for step, output in enumerate(run.outputs):
            row = rows[len(prompt) - 1 + step]
            assert output.logprob is not None
            assert output.logprob.token_id == output.token_id
            assert output.logprob.logprob == pytest.approx(float(row[output.token_id]), abs=2e-4)
            values, ids = row.topk(3)
            assert [top.token_id for top in output.top_logprobs] == ids.tolist()
            assert [top.logprob for top in output.top_logprobs] == pytest.approx(values.tolist(), abs=2e-4)
        told = run.outputs[0].prompt_logprobs
        assert told is not None
        assert told[0] is None
        assert [entry.token_id for entry in told[1:] if entry] == prompt[1:]
        known = [float(rows[index, token]) for index, token in enumerate(prompt[1:])]
        assert [entry.logprob for entry in told[1:] if entry] == pytest.approx(known, abs=2e-4)
        assert all(output.prompt_logprobs is None for output in run.outputs[1:])


def test_seeded_sampling_is_the_same_alone_in_a_batch_after_preemption_and_after_a_swap(
    model_dir: ModelDir, engine_for: EngineFor
) -> None:
    path = model_dir("qwen3")
    options = {"temperature": [1.0, 0.7, 1.5, 0.0, 1.0, 1.2], "top_p": [1.0, 0.9, 1.0, 1.0, 0.5, 0.8]}
    options |= {"top_k": [0, 0, 20, 0, 0, 5], "seed": [11, 12, 13, 14, 15, 16], "max_tokens": 24}
    engine = engine_for(path)
    batch = [run.tokens for run in run_all(engine, MIXED, **options)]
    for index, prompt in enumerate(MIXED):
        own = {key: value[index] if isinstance(value, list) else value for key, value in options.items()}
        assert Run(engine, "alone", prompt, **own).wait().tokens == batch[index]
    engine.demote()
    engine.promote(None)
    assert [run.tokens for run in run_all(engine, MIXED, **options)] == batch
    other_seeds = options | {"seed": [21, 22, 23, 24, 25, 26]}
    assert [run.tokens for run in run_all(engine, MIXED, **other_seeds)] != batch
    # Room for the longest sequence and a little more: the others are preempted and computed again.
    block_bytes = engine._pool._geometry.block_bytes(4)
    small = engine_for(path, kv_cache_bytes=20 * block_bytes, max_model_len=72)
    assert [run.tokens for run in run_all(small, MIXED, **options)] == batch
    assert small._scheduler.num_preemptions > 0


def test_greedy_tokens_survive_a_swap_and_the_weights_a_source_image(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    from mball.loader import image

    path = model_dir("qwen3_moe")
    engine = engine_for(path, promote=False)
    fd = image.create("test", engine.image_bytes)
    engine.fill_image(fd)
    image.seal(fd)
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in MIXED]
    for source in (None, fd, fd, None):
        engine.promote(source)
        assert [run.tokens for run in run_all(engine, MIXED)] == expected
        assert engine.demote().released_bytes > 0
    import os

    os.close(fd)


def test_stop_tokens_end_a_sequence_but_not_before_min_tokens(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = engine_for(path)
    expected, _ = reference(oracle(path), MIXED[3], 12)
    stop = expected[4]
    assert stop not in expected[:4]
    run = Run(engine, "stop", MIXED[3], stop_token_ids=frozenset({stop})).wait()
    assert (run.tokens, run.reason) == (expected[:5], "stop")
    run = Run(engine, "later", MIXED[3], stop_token_ids=frozenset({stop}), min_tokens=8).wait()
    assert stop not in run.tokens[:8]
    assert len(run.tokens) > 8


def test_bias_and_penalties_are_each_request_s_own(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"))
    same = [MIXED[3]] * 4
    biases = [{}, {42: 100.0}, {}, {}]
    runs = run_all(engine, same, logit_bias=biases, frequency_penalty=[0.0, 0.0, 0.0, 100.0], max_tokens=30)
    assert runs[0].tokens == runs[2].tokens
    assert set(runs[1].tokens) == {42}
    assert len(set(runs[3].tokens)) == 30, "a token came twice although it was punished"
    assert len(set(runs[0].tokens)) < 30


def test_a_sequence_ends_at_max_model_len(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"), max_model_len=20)
    assert engine.max_model_len == 20
    run = Run(engine, "long", MIXED[1], max_tokens=100).wait()
    assert (len(MIXED[1]) + len(run.tokens), run.reason) == (20, "length")


def test_no_new_token_is_drawn_where_none_is_wanted(model_dir: ModelDir, engine_for: EngineFor) -> None:
    run = Run(engine_for(model_dir("llama")), "echo", MIXED[1], max_tokens=0, prompt_logprobs=True).wait()
    assert run.tokens == []
    assert run.reason == "length"
    assert len(run.outputs[0].prompt_logprobs or ()) == len(MIXED[1])


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ([], {}, "no tokens"),
        ([5] * 64, {}, "max_model_len 64"),
        ([5, 199], {}, "vocabulary of 199"),
        ([-1], {}, "vocabulary of 199"),
        ([5], {"logit_bias": {1000: 1.0}}, "logit_bias"),
        ([5], {"logprobs": 21}, "21 logprobs"),
    ],
)
def test_what_can_never_be_served_ends_with_an_error(
    prompt: list[int], sampling: dict[str, Any], says: str, model_dir: ModelDir, engine_for: EngineFor
) -> None:
    engine = engine_for(model_dir("llama"), max_model_len=64)
    run = Run(engine, "bad", prompt, **sampling).wait()
    assert run.reason == "error"
    assert says in (run.error or "")
    assert Run(engine, "good", [5]).wait().reason == "length"


def test_an_image_is_given_up_when_it_is_not_wanted_any_more(model_dir: ModelDir, engine_for: EngineFor) -> None:
    from mball.loader import image

    engine = engine_for(model_dir("qwen3_moe"), promote=False)
    fd, unwanted = image.create("test", engine.image_bytes), threading.Event()
    unwanted.set()
    with pytest.raises(Cancelled):
        engine.fill_image(fd, unwanted)
    assert engine.fill_image(fd) > 0
    os.close(fd)
