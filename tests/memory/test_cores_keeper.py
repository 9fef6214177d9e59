"""Workers run where they were given cores."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from mball.device.cpu import CpuDevice
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import Running, Serve, model

SMALL = Knobs(weights_bytes=4 * MiB, kv_bytes=1 * MiB, token_s=0.5)
MINE = os.sched_getaffinity(0)


def where(running: Running, name: str) -> set[int]:
    pid = running.state(name)["pid"]
    found = [os.sched_getaffinity(int(task.name)) for task in (Path("/proc") / str(pid) / "task").iterdir()]
    assert all(cpus == found[0] for cpus in found), "every thread of it"
    return found[0]


async def threads(running: Running, name: str) -> int:
    worker = running.manager._models[name].worker
    assert worker is not None
    return int((await worker.call("status", deadline_s=5.0))["threads"])


@pytest.mark.skipif(len(MINE) < 2, reason="one core is nobody's to fight over")
async def test_two_that_compute_have_cores_of_their_own_and_one_alone_has_all(serve: Serve) -> None:
    running = await serve(model("a", SMALL), model("b", SMALL), on=CpuDevice(), device_bytes=200 * MiB)
    await running.manager.load("a")
    await running.manager.load("b")
    await running.until(lambda: where(running, "a") == where(running, "b") == MINE)
    asking = [asyncio.create_task(running.ask(name)) for name in "ab"]
    await running.until(lambda: not where(running, "a") & where(running, "b"))
    if len(MINE) == 2:
        await running.until(lambda: running.state("a")["cores"]["threads"] == 1)
        assert await threads(running, "a") == await threads(running, "b") == 1
        assert running.state("a")["cores"] == {"cpus": [min(MINE)], "threads": 1}
    await asyncio.gather(*asking)
    await running.until(lambda: where(running, "a") == where(running, "b") == MINE)
    await running.until(lambda: running.state("b")["cores"]["threads"] == 2)
    assert await threads(running, "b") == 2


async def test_a_worker_started_anew_is_given_its_cores_again(serve: Serve) -> None:
    running = await serve(model("a", SMALL), on=CpuDevice(), device_bytes=200 * MiB)
    await running.manager.load("a")
    await running.until(lambda: running.state("a")["cores"] is not None)
    worker = running.manager._models["a"].worker
    assert worker is not None
    worker.kill()
    await running.until(lambda: running.state("a")["cores"] is None)
    await running.manager.load("a")
    await running.until(lambda: running.state("a")["cores"] is not None)
