"""Mixtures of experts of which only a part is on the device: the same logprobs, bit by bit, as transformers' own way of
computing all of them at once gives with all of them there."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mball.errors import TransitionError, UnsupportedCheckpoint
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.memory.estimate import estimate, revision
from mball.memory.spec import WorkerSpec
from mball.server.engine import footprint
from mball.server.engine.engine import GenerateEngine
from mball.server.engine.experts import expert_modules
from mball.swap.experts import ExpertWeights
from tests.server.engine.conftest import CONFIGS
from tests.server.engine.driving import EngineFor, ModelDir, Run, prompts, run_all
from tests.server.engine.test_engine_life import SmallDevice
from tests.server.engine.test_layers import answers

LAYERS = 5
MIXTURES = ("qwen3_moe", "mixtral", "olmoe")
MIXED = prompts(6)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(13)
            config = CONFIGS[name]()
            config.num_hidden_layers = LAYERS
            made[name] = tmp_path_factory.mktemp("mixture") / name
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.save_pretrained(made[name], max_shard_size="100KB")
        return made[name]

    return make


def experts_of(engine: GenerateEngine) -> ExpertWeights:
    found = engine._weights.streamed
    assert isinstance(found, ExpertWeights)
    return found


def test_what_the_adapter_relies_on() -> None:
    for kind in (MixtralExperts, Qwen3MoeExperts):
        assert list(inspect.signature(kind.forward).parameters) == [
            "self",
            "hidden_states",
            "top_k_index",
            "top_k_weights",
        ]
    options = inspect.signature(moe.use_experts_implementation).parameters
    assert {"is_concatenated", "is_transposed", "has_bias", "has_gate"} <= set(options)


@pytest.mark.parametrize("name", MIXTURES)
def test_logprobs_are_the_same_whatever_part_of_the_experts_has_room(
    name: str, mixture: ModelDir, engine_for: EngineFor
) -> None:
    plain = engine_for(mixture(name))
    assert plain._weights.module.config._experts_implementation == "grouped_mm"
    expected = answers(plain)
    for wish in (0, 1, 4, 9, "auto"):
        engine = engine_for(mixture(name), resident_experts=wish)
        status = engine.status()
        assert status.num_experts == LAYERS * len(expert_counts(engine))
        assert status.resident_experts == (status.num_experts if wish == "auto" else int(wish) + 2)
        assert answers(engine) == expected, wish
        engine.demote()


def expert_counts(engine: GenerateEngine) -> range:
    (count,) = {module.num_experts for module in expert_modules(tuple(engine._weights.module.model.layers))}
    return range(count)


def test_half_the_precision_is_the_same_too(mixture: ModelDir, engine_for: EngineFor) -> None:
    expected = answers(engine_for(mixture("mixtral"), dtype="bfloat16"))
    assert answers(engine_for(mixture("mixtral"), dtype="bfloat16", resident_experts=2)) == expected


def test_a_batch_is_computed_as_with_all_experts_there(mixture: ModelDir, engine_for: EngineFor) -> None:
    expected = run_all(engine_for(mixture("olmoe"), max_num_seqs=1), MIXED, max_tokens=20)
    engine = engine_for(mixture("olmoe"), resident_experts=3, max_num_seqs=4)
    assert [run.tokens for run in run_all(engine, MIXED, max_tokens=20)] == [run.tokens for run in expected]


def test_one_sequence_s_logprobs_stay_while_experts_and_their_source_go_and_come(
    mixture: ModelDir, engine_for: EngineFor
) -> None:
    path = mixture("qwen3_moe")
    options = {"max_tokens": 150, "logprobs": 3, "temperature": 0.9, "seed": 5}
    plain = Run(engine_for(path, max_num_seqs=1), "plain", MIXED[3], **options).wait()
    engine = engine_for(path, max_num_seqs=1, resident_experts="auto")
    fd = image.create("experts", engine.image_bytes)
    try:
        engine.fill_image(fd)
        image.seal(fd)
        easy, experts = engine.status().spare_bytes, experts_of(engine)
        whole = experts.bytes_of(experts.max_cells)
        run = Run(engine, "moved", MIXED[3], **options)
        cells, sources = cycle([2, 20, 7, 13, 4]), cycle([fd, None])
        changes = 0
        while not run.done.is_set():
            engine.balloon(easy + whole - experts.bytes_of(next(cells)))
            engine.use_image(next(sources))
            changes += 1
            run.done.wait(0.01)
        engine.use_image(None)
    finally:
        os.close(fd)
    assert changes > 4
    assert experts.misses > 0
    assert [(o.token_id, o.logprob, o.top_logprobs) for o in run.outputs] == [
        (o.token_id, o.logprob, o.top_logprobs) for o in plain.outputs
    ]


def test_the_account_and_the_status_follow_the_balloon(mixture: ModelDir, engine_for: EngineFor) -> None:
    device = SmallDevice(1 << 40)
    engine = engine_for(mixture("mixtral"), resident_experts="auto", account=device)
    experts, before, whole = experts_of(engine), engine.status(), device.taken_bytes
    cell = experts.bytes_of(15) - experts.bytes_of(14)
    done = engine.balloon(before.spare_bytes + 5 * cell)
    status = engine.status()
    assert (status.resident_experts, status.num_experts) == (10, 15)
    assert status.weights_bytes == before.weights_bytes - 5 * cell
    assert done.ballooned_bytes == status.ballooned_bytes == before.spare_bytes + 5 * cell
    assert device.taken_bytes == whole - done.ballooned_bytes
    with pytest.raises(TransitionError, match="its weights are in use"):
        engine.balloon(before.spare_bytes + 7 * cell, gently=True)
    engine.demote()
    assert device.taken_bytes == 0
    engine.promote(None)
    answers(engine)
    engine.balloon(0)
    assert (engine.status().resident_experts, device.taken_bytes) == (15, whole)


def test_what_experts_could_be_given_is_told_with_what_that_costs(mixture: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(mixture("mixtral"), resident_experts="auto")
    assert engine.status().layer_bytes == 0, "no request has ended yet"
    Run(engine, "a", [5], max_tokens=20).wait()
    status, experts = engine.status(), experts_of(engine)
    assert status.layer_bytes == experts.bytes_of(15) - experts.bytes_of(2)
    assert experts.load_rate is not None
    # Two experts of each of five layers and twenty tokens would come, as far as they were there.
    assert status.layer_s == pytest.approx(20 * 2 * LAYERS * experts._cells.cell_bytes / experts.load_rate)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_promised_beforehand_is_what_is_taken(name: str, mixture: ModelDir, engine_for: EngineFor) -> None:
    for wish in (0, 6, "auto"):
        promoted = engine_for(mixture(name), resident_experts=wish, promote=False).promote(None)
        spec = WorkerSpec("tiny", str(mixture(name)), block_size=4, threads=1, resident_experts=wish)
        told, guessed = footprint(spec), estimate(spec)
        assert guessed is not None
        assert told.weights_bytes == guessed.weights_bytes
        assert promoted.weights_bytes <= told.weights_bytes < 1.02 * promoted.weights_bytes + 8192


def test_what_was_measured_with_other_room_tells_nothing(mixture: ModelDir) -> None:
    specs = [WorkerSpec("tiny", str(mixture("olmoe")), resident_experts=wish) for wish in (None, 3, 4, "auto")]
    specs.append(WorkerSpec("tiny", str(mixture("olmoe")), resident_experts="auto", device_memory_bytes=1 << 30))
    assert len({revision(spec) for spec in specs}) == len(specs)


def test_a_model_without_experts_is_told(model_dir: ModelDir, engine_for: EngineFor) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="no experts: leave resident_experts out"):
        engine_for(model_dir("llama"), resident_experts=2)


def test_a_shard_that_cannot_be_read_ends_the_step_and_the_engine_lives(
    mixture: ModelDir, engine_for: EngineFor, tmp_path: Path
) -> None:
    for file in mixture("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    engine: Any = engine_for(tmp_path, resident_experts=0)
    expected = answers(engine)
    shards = {shard.path: shard.path.read_bytes() for shard in Checkpoint.open(tmp_path).shards}
    for shard, content in shards.items():
        os.truncate(shard, len(content) // 2)
    assert "shrank" in (Run(engine, "failing", MIXED[0], max_tokens=50).wait().error or "")
    for shard, content in shards.items():
        shard.write_bytes(content)
    assert answers(engine) == expected
    assert engine.status().error is None
