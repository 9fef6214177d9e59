"""Memory that a GPU takes back while the process uses the rest (cuda-bindings)."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from mball.device.vmm import CudaRange, WholeRange, can_map, reserve
from mball.errors import DeviceOutOfMemory
from mball.units import MiB
from tests.server.engine.driving import EngineFor, ModelDir, Oracle, Run, prompts, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_bindings = pytest.mark.skipif(not can_map(), reason="cuda-bindings are not installed")

GPU = torch.device("cuda", 0)
SLACK = 8 * MiB


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(GPU)[0]


@needs_bindings
def test_what_goes_is_free_on_the_device_and_what_stays_keeps_its_content() -> None:
    space = reserve(1024 * MiB, GPU)
    assert isinstance(space, CudaRange)
    # The kernels that are used below take memory of their own when they are first used.
    warm = torch.zeros(1024, 4, device=GPU).copy_(torch.arange(1024, device=GPU, dtype=torch.float32)[:, None])
    assert float(warm[3].fill_(5).mean()) == 5
    assert bool((warm[:2] == torch.arange(2, device=GPU)[:, None]).any())
    torch.cuda.empty_cache()
    before = free_bytes()
    space.resize(1024 * MiB)
    assert before - free_bytes() == pytest.approx(1024 * MiB, abs=SLACK)
    bytes_view = space.tensor()
    assert (bytes_view.device, bytes_view.shape, bytes_view.dtype) == (GPU, (1024 * MiB,), torch.uint8)
    view = bytes_view.view(torch.float32).view(1024, -1)
    view.copy_(torch.arange(1024, device=GPU, dtype=torch.float32)[:, None].expand_as(view))
    torch.cuda.empty_cache()
    full = free_bytes()
    space.resize(256 * MiB)
    assert free_bytes() - full == pytest.approx(768 * MiB, abs=SLACK)
    expected = torch.arange(256, device=GPU, dtype=torch.float32)
    assert bool((view[:256] == expected[:, None]).all())
    space.resize(1024 * MiB)
    view[1023].fill_(5)
    assert bool((view[:256] == expected[:, None]).all())
    assert float(view[1023].mean()) == 5
    assert space.tensor().data_ptr() == bytes_view.data_ptr()
    full = free_bytes()
    space.close()
    assert free_bytes() - full == pytest.approx(1024 * MiB, abs=SLACK)
    space.close()


@needs_bindings
def test_more_than_there_is_is_refused_and_changes_nothing() -> None:
    total = torch.cuda.mem_get_info(GPU)[1]
    space = reserve(2 * total, GPU)
    space.resize(64 * MiB)
    # At need torch gives up what it has cached.
    torch.cuda.empty_cache()
    before = free_bytes()
    with pytest.raises(DeviceOutOfMemory):
        space.resize(2 * total)
    assert space.mapped_bytes == 64 * MiB
    assert abs(before - free_bytes()) < SLACK
    space.close()


@needs_bindings
def test_queued_work_ends_before_its_memory_goes() -> None:
    space = reserve(512 * MiB, GPU)
    space.resize(512 * MiB)
    view = space.tensor().view(torch.float32)
    for _ in range(50):
        view.add_(1.0).mul_(0.5)
    space.resize(32 * MiB)
    torch.cuda.synchronize()
    space.close()


def test_without_bindings_all_or_nothing() -> None:
    space = WholeRange(64 * MiB, GPU)
    space.resize(16 * MiB)
    assert (space.mapped_bytes, space.tensor().shape) == (64 * MiB, (64 * MiB,))
    space.close()
    assert space.mapped_bytes == 0


@needs_bindings
def test_no_token_changes_while_the_balloon_goes_in_and_out(
    model_dir: ModelDir, oracle: Oracle, engine_for: EngineFor
) -> None:
    path = model_dir("llama")
    engine = engine_for(path, device="cuda:0", kv_cache_bytes=512 * MiB, max_num_seqs=4)
    mixed = prompts(6)
    expected = [reference(oracle(path), prompt, 150)[0] for prompt in mixed]
    torch.cuda.empty_cache()
    before = free_bytes()
    ballooned = engine.balloon(384 * MiB)
    assert ballooned.ballooned_bytes >= 384 * MiB
    assert free_bytes() - before == pytest.approx(ballooned.ballooned_bytes, abs=SLACK)
    sizes = cycle([0, 448 * MiB, 256 * MiB, 480 * MiB])
    runs = [Run(engine, f"r{index}", prompt, max_tokens=150) for index, prompt in enumerate(mixed)]
    changes = 0
    while not all(run.done.is_set() for run in runs):
        engine.balloon(next(sizes))
        changes += 1
        runs[-1].done.wait(0.01)
    assert [run.wait().tokens for run in runs] == expected
    assert changes > 3
    engine.balloon(0)
    assert engine.status().ballooned_bytes == 0


@needs_bindings
def test_promotions_leave_no_addresses_and_no_memory_behind(model_dir: ModelDir, engine_for: EngineFor) -> None:
    engine = engine_for(model_dir("llama"), device="cuda:0", kv_cache_bytes=256 * MiB)
    engine.demote()
    before = free_bytes()
    for _ in range(20):
        engine.promote(None)
        assert Run(engine, "on", [5, 6, 7]).wait().reason == "length"
        engine.demote()
    assert abs(before - free_bytes()) < SLACK
