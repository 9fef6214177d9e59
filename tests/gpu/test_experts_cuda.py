"""Experts that come to a GPU by the router's choice: the same logprobs, in the memory that was told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig

from mball.device.vmm import can_map
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.registered import IMAGES
from mball.server.engine.engine import GenerateEngine
from mball.swap.experts import ExpertWeights
from mball.units import MiB
from tests.gpu.test_layers_cuda import MIXED, ON_GPU, answers
from tests.server.engine.driving import EngineFor, Run, run_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not can_map(), reason="no CUDA device, or no cuda-bindings"),
]

LAYERS, EXPERTS = 6, 16
ALL = LAYERS * EXPERTS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4.5 MiB an expert, four of sixteen chosen."""
    torch.manual_seed(17)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("experts")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    return folder


@pytest.fixture
def image_fd(path: Path) -> Iterator[int]:
    checkpoint = Checkpoint.open(path)
    fd = image.create("experts", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    image.seal(fd)
    yield fd
    IMAGES.detach(fd)
    os.close(fd)


def experts_of(engine: GenerateEngine) -> ExpertWeights:
    found = engine._weights.streamed
    assert isinstance(found, ExpertWeights)
    return found


@pytest.mark.parametrize("resident", [0, 5, ALL // 2])
@pytest.mark.parametrize("from_image", [True, False])
def test_logprobs_are_those_with_all_experts_there(
    path: Path, image_fd: int, engine_for: EngineFor, resident: int, from_image: bool
) -> None:
    """Computed one after the other in both: a grouped kernel rounds in its own way."""
    count = 24 if from_image else 3
    whole = engine_for(path, resident_experts=ALL, **ON_GPU)
    expected = answers(whole, count)
    assert experts_of(whole).misses == 0
    whole.demote()
    engine = engine_for(path, resident_experts=resident, promote=False, **ON_GPU)
    for _ in range(2):
        engine.promote(image_fd if from_image else None)
        assert answers(engine, count) == expected
        assert engine.status().resident_experts == resident + 2
        engine.demote()
    assert experts_of(engine).misses > 0
    engine.close()


def test_experts_go_and_come_and_change_their_source_while_a_sequence_runs(
    path: Path, image_fd: int, engine_for: EngineFor
) -> None:
    options = {"max_tokens": 80, "logprobs": 3, "temperature": 0.8, "seed": 3}
    engine = engine_for(path, resident_experts="auto", promote=False, **ON_GPU)
    engine.promote(image_fd)
    expected = [o.logprob for o in Run(engine, "plain", MIXED[2], **options).wait().outputs]
    experts, spare = experts_of(engine), engine.status().spare_bytes
    whole = experts.bytes_of(experts.max_cells)
    run = Run(engine, "moved", MIXED[2], **options)
    cells, sources = cycle([2, ALL, 40, 9, 70]), cycle([None, image_fd])
    changes = 0
    while not run.done.is_set():
        engine.balloon(spare + whole - experts.bytes_of(next(cells)))
        if changes % 3 == 2:
            engine.use_image(next(sources))
        changes += 1
        run.done.wait(0.02)
    assert changes > 4
    assert [o.logprob for o in run.outputs] == expected
    engine.close()


def test_a_batch_serves_through_few_cells_in_the_memory_that_was_told(
    path: Path, image_fd: int, engine_for: EngineFor
) -> None:
    engine = engine_for(
        path, resident_experts=6, promote=False, device="cuda:0", max_num_seqs=4, kv_cache_bytes=8 * MiB
    )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(0)[0]
    engine.promote(image_fd)
    status = engine.status()
    held = free - torch.cuda.mem_get_info(0)[0]
    assert abs(held - status.weights_bytes - status.kv_bytes) < 48 * MiB
    assert status.weights_bytes < 0.5 * Checkpoint.open(path).nbytes
    assert all(run.reason == "length" for run in run_all(engine, MIXED, max_tokens=20))
    engine.close()
