"""What a manager takes of a core when nobody asks for anything."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import pytest

from mball.device.simulated import SimulatedDevice
from mball.memory.settings import Settings
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Serve, model

MODELS = 50
SMALL = Knobs(weights_bytes=MiB, kv_bytes=MiB)


@pytest.mark.benchmark
@pytest.mark.parametrize("alive", [0, MODELS])
async def test_an_idle_manager_takes_less_than_a_hundredth_of_a_core(serve: Serve, tmp_path: Path, alive: int) -> None:
    settings = dataclasses.replace(Settings(), max_starts=4, zygote=False)
    device = SimulatedDevice.create(tmp_path / "large", 1000 * MiB)
    running = await serve(*(model(f"m{n}", SMALL) for n in range(MODELS)), settings=settings, on=device)
    for n in range(alive):
        await running.ask(f"m{n}")
    await asyncio.sleep(3.0)
    used, began = time.process_time(), time.monotonic()
    await asyncio.sleep(20.0)
    share = (time.process_time() - used) / (time.monotonic() - began)
    assert share < 0.01, f"{MODELS} models, {alive} workers alive: {share:.2%} of a core"
