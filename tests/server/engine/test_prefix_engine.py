"""KV that is kept, leaves the pool, comes back or fails to: the answers are those of an engine without any of it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mball.errors import TransitionError
from mball.server.engine.engine import GenerateEngine
from mball.swap.kv_local import LocalBlocks
from mball.swap.place import Place
from mball.swap.store import SwapStore, open_store
from mball.units import KiB, MiB
from tests.server.engine.conftest import CONFIGS
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference, run_all
from tests.server.engine.test_engine_life import BLOCK_BYTES
from tests.swap.stores import settings

SIZE = 4
ARENA = {"kv_arena_bytes": MiB}
ONE = {"max_num_seqs": 1}
LONG = [[int(token) for token in prompt] for prompt in torch.randint(3, 199, (6, 42)).tolist()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SwapStore]:
    opened = open_store(settings(tmp_path / "store", size_bytes=4 * MiB, slot_bytes=4 * KiB))
    yield opened
    opened.close()


def said(run: Run) -> list[object]:
    """Every token with the bits of its log probability."""
    assert run.error is None, run.error
    return [(output.token_id, output.logprob) for output in run.outputs]


def ask(engine: GenerateEngine, prompt: Sequence[int], name: str = "r", *, salt: str | None = None) -> list[object]:
    return said(Run(engine, name, prompt, logprobs=0, cache_salt=salt).wait())


def prime(engine: GenerateEngine, prompt: Sequence[int]) -> None:
    """The prompt alone: what is answered later meets no block but the prompt's."""
    Run(engine, "prime", prompt, max_tokens=1).wait()


def forced(engine: GenerateEngine) -> GenerateEngine:
    """Tiny models compute faster than a disk reads."""
    assert engine._tier is not None
    engine._tier.gate.forced = True
    return engine


def with_store(engine: GenerateEngine, store: SwapStore, kind: type[LocalBlocks] = LocalBlocks) -> GenerateEngine:
    forced(engine).use_block_store(kind(store, "worker"))
    return engine


@pytest.fixture
def filled(model_dir: ModelDir, engine_for: EngineFor, store: SwapStore) -> Path:
    """The store has the blocks of LONG[0], used twice by an engine that has ended."""
    path = model_dir("llama")
    engine = with_store(engine_for(path, **ARENA, **ONE), store)
    for _ in range(2):
        prime(engine, LONG[0])
    engine.close()
    assert engine.status().kv_stored_blocks == 10
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_that_is_there_already_is_not_computed_again(
    name: str, model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir(name)
    engine = engine_for(path, **ONE)
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in LONG[:2]]
    assert [run.tokens for run in run_all(engine, LONG[:2])] == expected
    assert engine.status().prefix_hit_tokens == 0
    assert [run.tokens for run in run_all(engine, LONG[:2])] == expected
    assert engine.status().prefix_hit_tokens == 2 * 40
    longer = [*LONG[0], *expected[0], 9, 8]
    assert Run(engine, "on", longer).wait().tokens == reference(oracle(path), longer, 12)[0]
    assert engine.status().prefix_hit_tokens == 2 * 40 + 52
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 40])
def test_at_least_one_token_is_computed(
    length: int, model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = engine_for(path)
    expected = reference(oracle(path), LONG[0][:length], 12)[0]
    for _ in range(3):
        assert Run(engine, "r", LONG[0][:length]).wait().tokens == expected
    assert engine.status().prefix_hit_tokens == 2 * ((length - 1) // SIZE * SIZE)


def test_prompt_logprobs_and_an_engine_without_it_compute_everything(
    model_dir: ModelDir, engine_for: EngineFor
) -> None:
    engine = engine_for(model_dir("llama"), **ONE)
    first = Run(engine, "a", LONG[0], prompt_logprobs=True).wait()
    ask(engine, LONG[0])
    second = Run(engine, "b", LONG[0], prompt_logprobs=True).wait()
    assert first.outputs[0].prompt_logprobs == second.outputs[0].prompt_logprobs
    assert engine.status().prefix_hit_tokens == 0
    without = engine_for(model_dir("llama"), enable_prefix_caching=False, **ARENA)
    assert ask(without, LONG[0]) == ask(without, LONG[0])
    assert without.status().prefix_hit_tokens == 0
    assert without._tier is None


def test_tenants_share_nothing(model_dir: ModelDir, engine_for: EngineFor, store: SwapStore) -> None:
    path = model_dir("llama")
    engine = with_store(engine_for(path, **ARENA, **ONE), store)
    expected = ask(engine, LONG[0], salt="a")
    for salt in ("b", None, "A"):
        assert ask(engine, LONG[0], salt=salt) == expected
    assert engine.status().prefix_hit_tokens == 0
    ask(engine, LONG[0], salt="a")
    assert engine.status().prefix_hit_tokens == 40
    engine.close()
    again = with_store(engine_for(path, **ARENA, **ONE), store)
    ask(again, LONG[0], salt="b")
    assert again.status().kv_restored_tokens == 0, "a tenant was given what another's second use stored"
    ask(again, LONG[0], salt="a")
    assert again.status().kv_restored_tokens == 40


def test_evicted_blocks_come_back_to_the_bit(model_dir: ModelDir, engine_for: EngineFor) -> None:
    path = model_dir("llama")
    plain = engine_for(path, **ONE)
    expected = []
    for prompt in LONG:
        prime(plain, prompt)
        expected.append(ask(plain, prompt))
    # Room for one sequence and a little: each evicts the one before.
    engine = forced(engine_for(path, **ONE, **ARENA, kv_cache_bytes=17 * BLOCK_BYTES, max_model_len=60))
    for prompt in LONG:
        prime(engine, prompt)
    for prompt, wanted in zip(LONG, expected, strict=True):
        assert ask(engine, prompt) == wanted
    status = engine.status()
    assert status.kv_restored_tokens >= 5 * 40
    assert status.kv_blocks_free == status.kv_blocks_total
    assert status.kv_failures == 0


def test_preempted_sequences_get_their_blocks_back(model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor) -> None:
    path = model_dir("llama")
    mixed = prompts(6)
    expected = [reference(oracle(path), prompt, 60)[0] for prompt in mixed]
    engine = forced(engine_for(path, kv_cache_bytes=44 * BLOCK_BYTES, max_model_len=128, max_num_seqs=4, **ARENA))
    assert [run.tokens for run in run_all(engine, mixed, max_tokens=60)] == expected
    status = engine.status()
    assert engine._scheduler.num_preemptions > 0
    assert status.prefix_hit_tokens + status.kv_restored_tokens > 0
    assert status.kv_restored_tokens > 0
    assert status.kv_blocks_free == status.kv_blocks_total


def test_prefixes_outlive_a_demotion(model_dir: ModelDir, engine_for: EngineFor) -> None:
    path = model_dir("llama")
    engine = forced(engine_for(path, **ONE, **ARENA))
    prime(engine, LONG[0])
    expected = ask(engine, LONG[0])
    for turn in range(1, 3):
        assert engine.demote().released_bytes > 0
        engine.promote(None)
        assert ask(engine, LONG[0]) == expected
        assert engine.status().kv_restored_tokens == turn * 40
    assert engine.status().prefix_hit_tokens == 40


def test_prefixes_outlive_the_process(filled: Path, engine_for: EngineFor, store: SwapStore, tmp_path: Path) -> None:
    plain = engine_for(filled, **ONE)
    prime(plain, LONG[0])
    expected = ask(plain, LONG[0])
    again = with_store(engine_for(filled, **ARENA, **ONE), store)
    assert ask(again, LONG[0]) == expected
    assert again.status().kv_restored_tokens == 40
    assert again.status().kv_failures == 0
    copied = shutil.copytree(filled, tmp_path / "elsewhere", copy_function=shutil.copy2)
    moved = with_store(engine_for(copied, **ARENA, **ONE), store)
    assert ask(moved, LONG[0]) == expected
    assert moved.status().kv_restored_tokens == 40, "the same files at another place"


def test_another_model_finds_nothing(filled: Path, engine_for: EngineFor, store: SwapStore, tmp_path: Path) -> None:
    """Trained on: the same names, shapes and sizes, other numbers."""
    changed = tmp_path / "changed"
    model = AutoModelForCausalLM.from_pretrained(filled, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.01
    model.save_pretrained(changed, max_shard_size="100KB")
    expected = ask(engine_for(changed, **ONE), LONG[0])
    for path, options in ((changed, {}), (filled, {"dtype": "bfloat16"}), (filled, {"block_size": 8})):
        engine = with_store(engine_for(path, **ARENA, **ONE, **options), store)
        found = ask(engine, LONG[0])
        assert engine.status().kv_restored_tokens == 0
        if path is changed:
            assert found == expected


def test_damaged_blocks_are_computed_again(
    filled: Path, oracle: Oracle, engine_for: EngineFor, store: SwapStore, tmp_path: Path
) -> None:
    with (tmp_path / "store").open("r+b") as file:
        for slot in range(store.layout.slots):
            at = store.layout.slot_at(slot) + 4096 + 700
            [byte] = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    engine = with_store(engine_for(filled, **ARENA, **ONE), store)
    assert Run(engine, "r", LONG[0]).wait().tokens == reference(oracle(filled), LONG[0], 12)[0]
    status = engine.status()
    assert status.kv_restored_tokens == 0
    assert status.kv_failures > 0
    assert status.error is None


def test_a_store_that_takes_nothing_changes_nothing(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor, store: SwapStore
) -> None:
    store._fail("planted")
    path = model_dir("llama")
    engine = with_store(engine_for(path, **ARENA, **ONE), store)
    expected = reference(oracle(path), LONG[0], 12)[0]
    for _ in range(2):
        assert Run(engine, "r", LONG[0]).wait().tokens == expected
        engine.demote()
        engine.promote(None)
    assert engine.status().kv_stored_blocks == 0
    assert engine.status().kv_restored_tokens == 40, "from memory"


class Hanging(LocalBlocks):
    """Finds nothing before it may."""

    may = threading.Event()
    asked = threading.Event()

    def find(self, keys: Sequence[bytes], model: bytes) -> list[Place]:
        self.asked.set()
        self.may.wait(60)
        return super().find(keys, model)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    Hanging.may.clear()
    Hanging.asked.clear()
    yield Hanging
    Hanging.may.set()


def test_others_are_served_while_one_waits_for_its_blocks(
    filled: Path, oracle: Oracle, engine_for: EngineFor, store: SwapStore, hanging: type[Hanging]
) -> None:
    engine = with_store(engine_for(filled, **ARENA), store, hanging)
    waiting = Run(engine, "waiting", LONG[0])
    assert hanging.asked.wait(60)
    # Too short to have anything in the store.
    assert Run(engine, "other", [5, 6, 7]).wait().tokens == reference(oracle(filled), [5, 6, 7], 12)[0]
    assert not waiting.first.is_set()
    assert (engine.status().running, engine.status().waiting) == (0, 1)
    hanging.may.set()
    assert waiting.wait().tokens == reference(oracle(filled), LONG[0], 12)[0]
    assert engine.status().kv_restored_tokens == 40


def test_what_is_late_is_computed(
    filled: Path, oracle: Oracle, engine_for: EngineFor, store: SwapStore, hanging: type[Hanging]
) -> None:
    engine = engine_for(filled, **ARENA, **ONE)
    ask(engine, LONG[1])
    engine.use_block_store(hanging(store, "worker"))
    assert Run(engine, "late", LONG[0]).wait().tokens == reference(oracle(filled), LONG[0], 12)[0]
    assert engine.status().kv_failures == 1
    assert engine.status().kv_restored_tokens == 0


@pytest.mark.parametrize("how", ["abort", "demote", "balloon", "close"])
def test_what_happens_while_blocks_are_loading(
    how: str, filled: Path, oracle: Oracle, engine_for: EngineFor, store: SwapStore, hanging: type[Hanging]
) -> None:
    engine = with_store(engine_for(filled, **ARENA), store, hanging)
    waiting = Run(engine, "waiting", LONG[0])
    assert hanging.asked.wait(60)
    match how:
        case "abort":
            engine.abort("waiting")
            assert waiting.wait().reason == "abort"
        case "demote":
            engine.demote()
            assert waiting.wait().reason == "abort"
            engine.promote(None)
        case "balloon":
            engine.balloon(engine.status().spare_bytes)
        case _:
            hanging.may.set()
            engine.close()
            assert waiting.wait().reason == "abort"
            return
    hanging.may.set()
    expected = reference(oracle(filled), LONG[0], 12)[0]
    assert Run(engine, "next", LONG[0]).wait().tokens == expected
    if how == "balloon":
        assert waiting.wait().tokens == expected
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total


def test_a_store_may_go_and_another_come(
    filled: Path, engine_for: EngineFor, store: SwapStore, hanging: type[Hanging]
) -> None:
    engine = with_store(engine_for(filled, **ARENA, **ONE), store)
    engine.use_block_store(None)
    expected = ask(engine, LONG[1])
    assert engine.status().kv_restored_tokens == 0
    engine.use_block_store(LocalBlocks(store, "worker"))
    ask(engine, LONG[0])
    assert engine.status().kv_restored_tokens == 40
    assert ask(engine, LONG[1])[0] is not None
    assert len(expected) == 12
    engine.use_block_store(hanging(store, "worker"))
    waiting = Run(engine, "waiting", LONG[2])
    assert hanging.asked.wait(60)
    tier = engine._tier
    assert tier is not None
    assert tier.use_store(None, 0.1) is False
    hanging.may.set()
    assert waiting.wait().reason == "length"
    engine.use_block_store(None)


def test_the_balloon_takes_kept_blocks_and_moves_the_others(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = forced(engine_for(path, **ARENA, kv_cache_bytes=200 * BLOCK_BYTES, max_model_len=60))
    expected = [reference(oracle(path), prompt, 12)[0] for prompt in LONG]
    assert [run.tokens for run in run_all(engine, LONG)] == expected
    spare = engine.status().spare_bytes
    assert spare > 100 * BLOCK_BYTES, "kept blocks are nobody's"
    running = Run(engine, "running", LONG[0], max_tokens=17)
    engine.balloon(spare, gently=True)
    assert running.wait().tokens == reference(oracle(path), LONG[0], 17)[0]
    assert [run.tokens for run in run_all(engine, LONG)] == expected
    engine.balloon(0)
    assert [run.tokens for run in run_all(engine, LONG)] == expected
    assert engine.status().kv_restored_tokens > 0
    assert engine.status().kv_blocks_free == engine.status().kv_blocks_total


def test_a_sequence_that_went_wrong_leaves_no_names(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama_untied_gqa1"), **ONE)
    embedding = engine._weights.module.model.embed_tokens.weight
    kept = embedding[150].clone()
    with torch.no_grad():
        embedding[150] = float("nan")
    assert Run(engine, "bad", [150] * 20).wait().reason == "error"
    with torch.no_grad():
        embedding[150] = kept
    good = Run(engine, "good", [150] * 20).wait()
    assert good.reason == "length", good.error
    assert engine.status().prefix_hit_tokens == 0


def test_an_engine_whose_store_does_not_end_says_so(
    filled: Path, engine_for: EngineFor, store: SwapStore, hanging: type[Hanging], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = with_store(engine_for(filled, **ARENA), store, hanging)
    tier = engine._tier
    assert tier is not None
    monkeypatch.setattr(tier, "use_store", lambda store: False)
    with pytest.raises(TransitionError, match="does not end"):
        engine.use_block_store(None)
