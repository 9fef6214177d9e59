"""Models of 15 and 30 GiB in a fraction of that: embeddings, head, KV and all temporaries counted."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mball.device.host import available_bytes
from mball.device.vmm import can_map
from mball.loader import image
from mball.loader.checkpoint import Checkpoint
from mball.loader.registered import IMAGES
from mball.server.models import random
from mball.server.models.architectures import Architecture
from mball.units import GiB, MiB, format_bytes
from tests.server.engine.driving import EngineFor, Run, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available() or not can_map(), reason="no CUDA device, or no cuda-bindings"),
]


@dataclass(frozen=True, slots=True)
class Case:
    """`option` says what is streamed."""

    architecture: Architecture
    size_bytes: int
    limit_bytes: int
    option: str


CASES = {
    "8B in 4 GiB": Case("llama", 15 * GiB, 4 * GiB, "resident_layers"),
    "30 GiB in 8 GiB": Case("llama", 30 * GiB, 8 * GiB, "resident_layers"),
    "a mixture of 15 GiB in 4 GiB": Case("qwen3-moe", 15 * GiB, 4 * GiB, "resident_experts"),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    free_bytes = torch.cuda.mem_get_info(0)[0]
    if free_bytes < found.size_bytes + 4 * GiB:
        pytest.skip(f"all of it takes {format_bytes(found.size_bytes)} of the GPU, {format_bytes(free_bytes)} are free")
    if available_bytes() < 2 * found.size_bytes + 8 * GiB:
        pytest.skip(f"its image beside its files takes {format_bytes(2 * found.size_bytes)} of DRAM")
    return found


@pytest.fixture
def path(case: Case, tmp_path: Path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < case.size_bytes + 2 * GiB:
        pytest.skip(f"its files take {format_bytes(case.size_bytes)} of {tmp_path}; name another folder by --basetemp")
    folder = tmp_path / "model"
    random.make(case.architecture, folder, size_bytes=case.size_bytes, max_shard_bytes=4 * GiB)
    yield folder
    shutil.rmtree(folder)


def answers(engine: Any, low: list[int]) -> list[Any]:
    """Of three sequences, one after the other; how little was free of the device at any of their steps."""
    found: list[Any] = []
    head = engine._weights.module.lm_head.register_forward_hook(lambda *_: low.append(torch.cuda.mem_get_info(0)[0]))
    for index, prompt in enumerate(prompts(3)):
        run = Run(engine, f"a{index}", prompt, max_tokens=8, logprobs=4, prompt_logprobs=True).wait()
        assert run.error is None, run.error
        found.append([(output.token_id, output.logprob, output.top_logprobs) for output in run.outputs])
        found.append(run.outputs[0].prompt_logprobs)
    head.remove()
    return found


def test_a_large_model_answers_in_little_memory_as_with_all_of_it(
    case: Case, path: Path, engine_for: EngineFor, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"device": "cuda:0", "max_num_seqs": 1, "max_model_len": 256, "promote": False}
    checkpoint = Checkpoint.open(path)
    fd = image.create("large", checkpoint.image_bytes)
    try:
        image.fill(checkpoint, fd)
        image.seal(fd)
        # A mixture's experts are computed one after the other in both: a grouped kernel rounds in its own way.
        whole = engine_for(path, **options, **({} if case.option == "resident_layers" else {case.option: 1 << 20}))
        whole.promote(fd)
        expected = answers(whole, [])
        assert whole.status().weights_bytes > 0.95 * case.size_bytes
        whole.close()

        engine = engine_for(path, **options, **{case.option: "auto", "device_memory_bytes": case.limit_bytes})
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free_bytes = torch.cuda.mem_get_info(0)[0]
        low: list[int] = []
        engine.promote(fd)
        assert answers(engine, low) == expected
        status = engine.status()
        ours = status.weights_bytes + status.kv_bytes
        torch_bytes = torch.cuda.max_memory_reserved()
        held_bytes = free_bytes - min(low)
        engine.close()
    finally:
        IMAGES.detach(fd)
        os.close(fd)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{format_bytes(checkpoint.nbytes)}: weights and KV {ours / MiB:.0f} MiB, torch's peak beside them "
            f"{torch_bytes / MiB:.0f}, taken of the driver {held_bytes / MiB:.0f} of {case.limit_bytes / MiB:.0f} MiB\n"
        )
    assert ours + torch_bytes <= case.limit_bytes
    assert held_bytes <= case.limit_bytes
