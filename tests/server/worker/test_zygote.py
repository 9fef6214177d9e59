"""The real zygote: real imports, real (small) models."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from mball.memory.nursery import Nursery
from mball.memory.process import Hello, WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.server.worker.zygote import merged
from mball.units import MiB

COMMAND = (sys.executable, "-m", "mball.server.worker")
SETTINGS = Settings()


async def answer(nursery: Nursery, spec: WorkerSpec, folder: Path) -> tuple[str, Hello, list[str]]:
    """(what a new worker says, its hello, its command line)."""
    spec = replace(spec, socket_path=str(folder / "w.sock"))
    worker, hello = await WorkerProcess.start(
        COMMAND, spec, extra_environment={}, log=folder / "w.log", settings=SETTINGS, launch=nursery.launch
    )
    try:
        await worker.call("promote", deadline_s=60.0, epoch=1)
        transport = httpx.AsyncHTTPTransport(uds=spec.socket_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=120.0) as http:
            body = {"model": spec.model, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
            text = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        await worker.call("demote", deadline_s=60.0, epoch=2)
        return text, hello, psutil.Process(worker.pid).cmdline()
    finally:
        await worker.stop(SETTINGS)


def test_what_an_interpreters_script_sets_stays_set() -> None:
    before = {"PYTHONPATH": "/mball", "OMP_NUM_THREADS": "1", "HOME": "/h"}
    given = {"PYTHONPATH": "/mball", "OMP_NUM_THREADS": "4", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "1"}
    own = {**before, "PYTHONPATH": "/mball:/engine", "IMPORTED": "yes"}
    assert merged(given, before, own) == {**given, "PYTHONPATH": "/mball:/engine", "IMPORTED": "yes"}


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_forked_worker_says_what_a_fresh_one_does(tiny_model: Path, threads: int) -> None:
    spec = WorkerSpec(model="tiny", path=str(tiny_model), max_num_seqs=1, max_model_len=256, threads=threads)
    answers = []
    with tempfile.TemporaryDirectory(prefix="mball-") as name:
        folder = Path(name)
        for zygotes in ({}, {COMMAND: [sys.executable, "-m", "mball.server.worker.zygote"]}):
            nursery = Nursery(zygotes, SETTINGS, folder, folder)
            await nursery.open()
            try:
                text, hello, line = await answer(nursery, spec, folder)
            finally:
                await nursery.close()
            assert hello.baseline_bytes > 50 * MiB
            assert (line[0] == sys.executable) == (not zygotes)  # a forked one names itself
            answers.append(text)
    assert answers[0] == answers[1]
    assert answers[0]
