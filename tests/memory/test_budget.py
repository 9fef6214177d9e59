"""The budget of the CPU device, as another process sees it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mball.device.cpu import CpuDevice
from mball.units import MiB
from tests.fake_worker import Knobs
from tests.memory.conftest import QUICK, Serve, model

WATCHER = """
import json, sys, time
from mball.device.proc import private_bytes
peak = samples = 0
print("watching", flush=True)
while True:
    baselines = json.load(open(sys.argv[1]))
    if baselines is None:
        break
    held = [max(0, (private_bytes(int(pid)) or 0) - baseline) for pid, baseline in baselines.items()]
    peak, samples = max(peak, sum(held)), samples + 1
    time.sleep(0.002)
print(json.dumps([peak, samples]))
"""


async def test_what_workers_hold_never_exceeds_the_budget(serve: Serve, tmp_path: Path) -> None:
    budget = 130 * MiB
    knobs = Knobs(weights_bytes=80 * MiB, kv_bytes=20 * MiB, working_bytes=16 * MiB)
    running = await serve(*(model(name, knobs) for name in "abc"), on=CpuDevice(), device_bytes=budget, settings=QUICK)
    told = tmp_path / "baselines"

    def tell(known: Any) -> None:
        fresh = told.with_suffix(".new")
        fresh.write_text(json.dumps(known))
        fresh.replace(told)

    for name in "abc":
        await running.manager.load(name)
    tell({str(m["pid"]): m["baseline_bytes"] for m in running.manager.snapshot()["models"]})
    watcher = subprocess.Popen([sys.executable, "-c", WATCHER, str(told)], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert watcher.stdout is not None
    await asyncio.to_thread(watcher.stdout.readline)
    clients = asyncio.Semaphore(4)

    async def ask(number: int) -> str:
        async with clients:
            return await running.ask("abc"[number % 3])

    answers = await asyncio.gather(*(ask(number) for number in range(30)))
    assert answers == [f"{'abc'[number % 3]} 1 2 3 " for number in range(30)]
    tell(None)
    peak, samples = json.loads((await asyncio.to_thread(watcher.communicate))[0])
    assert samples > 50
    assert knobs.weights_bytes <= peak <= budget
    assert running.manager.snapshot()["promotions"] >= 6


async def test_a_worker_that_keeps_its_pages_is_stopped(serve: Serve) -> None:
    liar = Knobs(weights_bytes=80 * MiB, kv_bytes=0, kept_bytes=1)
    running = await serve(model("liar", liar), model("b"), on=CpuDevice(), device_bytes=110 * MiB)
    await running.ask("liar")
    pid = running.state("liar")["pid"]
    await running.ask("b")
    assert running.state("liar")["pid"] is None
    assert CpuDevice().process_bytes(pid) is None
