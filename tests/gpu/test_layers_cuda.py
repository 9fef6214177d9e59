"""Layers streamed to a GPU while it computes: the same logprobs, in the memory that was told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from mball.device.vmm import can_map
from mball.errors import UnsupportedCheckpoint
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.registered import IMAGES
from mball.server.engine.engine import GenerateEngine
from mball.units import MiB
from tests.server.engine.driving import EngineFor, Run, prompts, run_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not can_map(), reason="no CUDA device, or no cuda-bindings"),
]

LAYERS = 12
MIXED = prompts(5)
ON_GPU = {"device": "cuda:0", "max_num_seqs": 1, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 25 MiB a layer, several pieces of an image in all."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("layers")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    return folder


@pytest.fixture
def image_fd(path: Path) -> Iterator[int]:
    checkpoint = Checkpoint.open(path)
    fd = image.create("layers", checkpoint.image_bytes)
    image.fill(checkpoint, fd)
    image.seal(fd)
    yield fd
    os.close(fd)


def answers(engine: GenerateEngine, count: int = 24) -> list[Any]:
    found: list[Any] = []
    for index, prompt in enumerate(MIXED):
        run = Run(engine, f"a{index}", prompt, max_tokens=count, logprobs=4, prompt_logprobs=True).wait()
        assert run.error is None, run.error
        found.append([(output.token_id, output.logprob, output.top_logprobs) for output in run.outputs])
        found.append(run.outputs[0].prompt_logprobs)
    return found


def layers_of(engine: GenerateEngine) -> Any:
    assert engine._weights.streamed is not None
    return engine._weights.streamed


@pytest.mark.parametrize("resident", [0, 1, 5, LAYERS])
@pytest.mark.parametrize("from_image", [True, False])
def test_logprobs_are_those_of_full_residency(
    path: Path, image_fd: int, engine_for: EngineFor, resident: int, from_image: bool
) -> None:
    # A disk may take a quarter of a second for each step.
    count = 24 if from_image else 3
    plain = engine_for(path, **ON_GPU)
    expected = answers(plain, count)
    plain.demote()
    engine = engine_for(path, resident_layers=resident, promote=False, **ON_GPU)
    for _ in range(2):
        engine.promote(image_fd if from_image else None)
        assert answers(engine, count) == expected
        assert engine.status().resident_layers <= max(resident, 0) or resident + 2 >= LAYERS
        engine.demote()
    engine.close()
    IMAGES.detach(image_fd)


def test_layers_go_and_come_and_change_their_source_while_a_sequence_runs(
    path: Path, image_fd: int, engine_for: EngineFor
) -> None:
    plain = engine_for(path, **ON_GPU)
    options = {"max_tokens": 80, "logprobs": 3, "temperature": 0.8, "seed": 3}
    expected = [o.logprob for o in Run(plain, "plain", MIXED[2], **options).wait().outputs]
    plain.demote()
    engine = engine_for(path, resident_layers="auto", promote=False, **ON_GPU)
    engine.promote(image_fd)
    layers, spare = layers_of(engine), engine.status().spare_bytes
    whole = layers.bytes_of(LAYERS)
    run = Run(engine, "moved", MIXED[2], **options)
    cells, sources = cycle([2, LAYERS, 7, 3, 10]), cycle([None, image_fd])
    changes = 0
    while not run.done.is_set():
        engine.balloon(spare + whole - layers.bytes_of(next(cells)))
        if changes % 3 == 2:
            engine.use_image(next(sources))
        changes += 1
        run.done.wait(0.02)
    assert changes > 4
    assert [o.logprob for o in run.outputs] == expected
    engine.close()
    IMAGES.detach(image_fd)


def test_a_batch_serves_through_two_slots(path: Path, engine_for: EngineFor, image_fd: int) -> None:
    engine = engine_for(path, resident_layers=0, promote=False, device="cuda:0", max_num_seqs=4)
    engine.promote(image_fd)
    assert all(run.reason == "length" for run in run_all(engine, MIXED, max_tokens=20))
    engine.close()
    IMAGES.detach(image_fd)


def test_the_device_shows_what_the_status_tells(path: Path, image_fd: int, engine_for: EngineFor) -> None:
    """Cells are the driver's memory, not torch's: torch's peak is what computing takes."""
    engine = engine_for(path, resident_layers=2, promote=False, kv_cache_bytes=8 * MiB, **ON_GPU)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info(0)[0]
    engine.promote(image_fd)
    status = engine.status()
    held = free - torch.cuda.mem_get_info(0)[0]
    assert abs(held - status.weights_bytes - status.kv_bytes) < 48 * MiB
    answers(engine)
    assert torch.cuda.max_memory_allocated() - allocated < 96 * MiB
    assert status.weights_bytes < 0.5 * Checkpoint.open(path).nbytes
    layers = layers_of(engine)
    before = torch.cuda.mem_get_info(0)[0]
    gives = status.spare_bytes + layers.bytes_of(4) - layers.bytes_of(2)
    engine.balloon(gives)
    assert torch.cuda.mem_get_info(0)[0] - before >= gives - 16 * MiB
    engine.demote()
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info(0)[0] < 80 * MiB
    engine.close()
    IMAGES.detach(image_fd)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_wait_for_no_copy_on_the_host(path: Path, image_fd: int, engine_for: EngineFor) -> None:
    """All that a step with an image does is queue: the module's forward returns before the device has done it."""
    engine = engine_for(path, resident_layers=0, promote=False, **ON_GPU)
    engine.promote(image_fd)
    answers(engine)
    synced: list[str] = []

    def before(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def after(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        synced.append("no")

    engine._weights.module.model.layers[0].register_forward_pre_hook(before, prepend=True)
    engine._weights.module.model.layers[LAYERS - 1].register_forward_hook(after)
    try:
        run = Run(engine, "free", MIXED[0], max_tokens=10).wait()
        assert run.error is None, run.error
        assert len(synced) == 10
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.close()
    IMAGES.detach(image_fd)


def test_a_gpu_casts_no_streamed_layers(path: Path, engine_for: EngineFor) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="as they are stored"):
        engine_for(path, resident_layers=2, dtype="float32", **ON_GPU)
