"""What was measured is known after a restart, and forgotten where the model has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.spec import ModelSpec
from mball.units import MiB
from tests.fake_worker import Knobs, command
from tests.memory.conftest import QUICK, Running, model

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """A model with files: 70 bytes of weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.zeros(35, dtype=torch.bfloat16)}, folder / "model.safetensors")
    made = model("a", Knobs(promote_s=0.2))
    return dataclasses.replace(made, worker=dataclasses.replace(made.worker, path=str(folder), kv_cache_bytes=4096))


@contextlib.asynccontextmanager
async def running(spec: ModelSpec, device: SimulatedDevice, runtime_dir: Path, state: Path) -> AsyncIterator[Running]:
    manager = Manager(
        [spec],
        [(device, device.total_bytes)],
        dram_bytes=0,
        runtime_dir=runtime_dir,
        command_for=lambda _: command(),
        settings=dataclasses.replace(QUICK, working_bytes=0),
        state_dir=state,
    )
    await manager.start()
    try:
        yield Running(manager)
    finally:
        await manager.close(0.0)


async def test_figures_are_kept_over_a_restart(
    spec: ModelSpec, device: SimulatedDevice, runtime_dir: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    async with running(spec, device, runtime_dir, state) as first:
        fresh = first.state("a")
        assert fresh["known_from"] == "estimate"
        assert fresh["needed_bytes"] == 70 + 4096 + 70 // 8
        await first.ask("a")
        before = first.state("a")
        assert before["known_from"] == "measured"
        assert before["needed_bytes"] == 81 * MiB
        first.manager._models["a"].figures.busy.add(5, 0.0, used=True)
    async with running(spec, device, runtime_dir, state) as second:
        after = second.state("a")
        assert after["pid"] is None
        assert after["known_from"] == "measured"
        assert after["needed_bytes"] == 81 * MiB
        assert second.manager._models["a"].figures.busy.value == 5
        assert after["promote_s"] == before["promote_s"] >= 0.2
        assert 0 < after["rate"] <= before["rate"]
    (Path(spec.worker.path) / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 1}))
    async with running(spec, device, runtime_dir, state) as third:
        changed = third.state("a")
        assert changed["known_from"] == "estimate"
        assert changed["rate"] == 0
    (state / "figures.json").write_text("damaged")
    async with running(spec, device, runtime_dir, state) as fourth:
        assert fourth.state("a")["known_from"] == "estimate"
        assert await fourth.ask("a") == "a 1 2 3 "
