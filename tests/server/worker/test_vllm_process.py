"""vLLM's own server as a worker: real vLLM on the CPU, told what the manager tells."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mball.device import memfd, proc
from mball.device.cpu import CpuDevice
from mball.errors import VerbFailed, WorkerNotStarted
from mball.memory import launch
from mball.memory.events import Events
from mball.memory.launch import Launch
from mball.memory.nursery import Nursery
from mball.memory.process import Hello, WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.memory.swap_broker import SwapBroker
from mball.memory.swap_images import MODEL
from mball.memory.swap_keeper import SwapKeeper
from mball.server.engine_path import search_path
from mball.server.models import random
from mball.swap.place import Place
from mball.units import MiB
from tests.demo_models import demo_model
from tests.swap.stores import settings
from tests.vllm_bed import damage_all
from tests.vllm_python import vllm_python

WEIGHTS_BYTES = 256 * MiB
KV_BYTES = 96 * MiB
PROMPT = "The capital of France is"
RAW = [5, 6, 7, 8, 9]
"""For a model without a tokenizer."""
SETTINGS = Settings(start_s=400, verb_s=20)


def spec_in(folder: Path, **options: Any) -> WorkerSpec:
    return WorkerSpec(
        "smol",
        str(demo_model("smollm2-135m")),
        socket_path=str(folder / "w.sock"),
        max_model_len=1024,
        max_num_seqs=2,
        kv_cache_bytes=KV_BYTES,
        engine="vllm",
        engine_args={"enforce_eager": True, **options},
    )


async def started(
    folder: Path, spec: WorkerSpec, python: Path | None = None, launch: Launch = launch.fresh, **more: str
) -> tuple[WorkerProcess, Hello]:
    """`more` of its environment."""
    path = {"PYTHONPATH": search_path(folder / "path"), **more}
    return await WorkerProcess.start(
        [str(python or vllm_python()), "-m", "mball.server.worker.vllm_process"],
        spec,
        extra_environment=path,
        log=folder / "vllm.log",
        settings=SETTINGS,
        launch=launch,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vllm_python()
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """Of a worker that was started afresh: what it said (`text`), and where its start went (`stages`)."""
    return {}


async def text_of(socket_path: str, prompt: str | list[int] = PROMPT) -> tuple[str, list[float]]:
    """A greedy answer, and the log probability of each of its tokens."""
    connector = aiohttp.UnixConnector(socket_path)
    body = {"model": "smol", "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://worker/v1/completions", json=body) as answer,
    ):
        assert answer.status == 200, await answer.text()
        choice = (await answer.json())["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


async def test_its_life(folder: Path, fresh: dict[str, Any]) -> None:
    """One start for all: it takes half a minute."""
    spec, device = spec_in(folder), CpuDevice()
    worker, hello = await started(folder, spec)
    try:
        assert hello.resident
        assert abs(hello.weights_bytes - WEIGHTS_BYTES) < MiB
        assert hello.image_bytes == hello.weights_bytes
        assert abs(hello.kv_bytes - KV_BYTES) < 8 * MiB

        def held() -> int:
            return device.process_bytes(worker.pid, hello.baseline_bytes) or 0

        assert held() > WEIGHTS_BYTES
        assert (await worker.call("canary", deadline_s=60))["ok"]
        before = await text_of(spec.socket_path)
        assert "Paris" in before[0]
        fresh |= {"text": before, "stages": hello.stages}

        # Nobody else's: what /sleep and /collective_rpc are reached by.
        assert Path(spec.socket_path).stat().st_mode & 0o077 == 0

        # Without an image the weights are forgotten, and read again.
        await asleep_and_back(worker, hello, held, spec, before, epoch=1)

        # With one they come from there, and nothing was copied when they went.
        fd = memfd.create("smol", hello.image_bytes)
        try:
            filled = await worker.call("image", deadline_s=60, fd=fd, state="empty")
            assert filled["bytes"] == hello.image_bytes
            memfd.seal(fd)
            assert (await worker.call("status", deadline_s=10))["image"]
            for epoch in (2, 3):
                await asleep_and_back(worker, hello, held, spec, before, epoch)
                assert image_is_mapped(worker.pid, os.fstat(fd).st_ino)
            # It may go while the weights are in it alone: they are read again.
            await worker.call("demote", deadline_s=60, epoch=4)
            await worker.call("drop_image", deadline_s=60)
            assert not image_is_mapped(worker.pid, os.fstat(fd).st_ino)
            assert (await worker.call("promote", deadline_s=60, epoch=4))["weights_from"] == "source"
            assert await text_of(spec.socket_path) == before
            await from_the_store(worker, filled, fd, folder, partial(text_of, spec.socket_path))
        finally:
            os.close(fd)

        with pytest.raises(VerbFailed, match="epoch 3"):
            await worker.call("demote", deadline_s=60, epoch=3)
        with pytest.raises(VerbFailed, match="can't be made smaller"):
            await worker.call("balloon", deadline_s=60, epoch=9, bytes=MiB, gently=False)
        assert await worker.call("balloon", deadline_s=60, epoch=9, bytes=0, gently=False) == {"ballooned_bytes": 0}
        family = proc.family(worker.pid)
        assert len(family) > 2
    finally:
        await worker.stop(SETTINGS)
    assert worker.exit_code == 0
    assert [pid for pid in family if proc.start_ticks(pid) is not None] == []


async def test_a_forked_worker_says_what_a_fresh_one_does_and_a_dead_zygote_is_replaced(
    folder: Path, tmp_path: Path, fresh: dict[str, Any]
) -> None:
    if not fresh:
        pytest.skip("it is compared with what the test of a worker's life found")
    command = (str(vllm_python()), "-m", "mball.server.worker.vllm_process")
    line, path = [command[0], "-m", "mball.server.worker.vllm_zygote"], search_path(folder / "path")
    nursery = Nursery({command: line}, SETTINGS, tmp_path, tmp_path, {command: path})
    await nursery.open()
    try:
        spec = replace(spec_in(folder), socket_path=str(folder / "forked.sock"))
        worker, hello = await started(folder, spec, launch=nursery.launch)
        try:
            assert Path(f"/proc/{worker.pid}/cmdline").read_text().startswith("mball.server.worker")
            assert await text_of(spec.socket_path) == fresh["text"]
            assert hello.stages["import_s"] < 0.5 * fresh["stages"]["import_s"]
            assert hello.stages["ready_s"] < fresh["stages"]["ready_s"]
            await worker.call("demote", deadline_s=60, epoch=1)
            await worker.call("promote", deadline_s=120, epoch=1)
            assert await text_of(spec.socket_path) == fresh["text"]
            family = proc.family(worker.pid)
        finally:
            await worker.stop(SETTINGS)
        assert [pid for pid in family if proc.start_ticks(pid) is not None] == []
        (zygote,) = nursery.pids()
        os.kill(zygote, signal.SIGKILL)
        async with asyncio.timeout(SETTINGS.start_s):
            while not [pid for pid in nursery.pids() if pid != zygote]:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.1)
    finally:
        await nursery.close()


async def test_two_ranks_are_one_worker(folder: Path, tmp_path: Path) -> None:
    """Their parts are one image, and come back each to its own: from DRAM, from the store, from the files."""
    random.make("llama", tmp_path / "m", size_bytes=64 * MiB, seed=3)
    ranks = replace(
        spec_in(tmp_path),
        model="smol",
        path=str(tmp_path / "m"),
        engine_args={"enforce_eager": True, "tensor_parallel_size": 2},
    )
    # By itself vLLM wants a NUMA node for each.
    worker, hello = await started(folder, ranks, VLLM_CPU_OMP_THREADS_BIND="nobind")
    try:
        before = await text_of(ranks.socket_path, RAW)
        fd = memfd.create("m", hello.image_bytes)
        try:
            filled = await worker.call("image", deadline_s=60, fd=fd, state="empty")
            memfd.seal(fd)
            for epoch in (1, 2):
                await worker.call("demote", deadline_s=60, epoch=epoch)
                assert (await worker.call("promote", deadline_s=60, epoch=epoch))["weights_from"] == "dram"
                assert await text_of(ranks.socket_path, RAW) == before
            await worker.call("drop_image", deadline_s=60)
            await from_the_store(worker, filled, fd, tmp_path, partial(text_of, ranks.socket_path, RAW))
        finally:
            os.close(fd)
        family = proc.family(worker.pid)
    finally:
        await worker.stop(SETTINGS)
    assert [pid for pid in family if proc.start_ticks(pid) is not None] == []


async def from_the_store(
    worker: WorkerProcess,
    filled: dict[str, Any],
    fd: int,
    folder: Path,
    ask: Callable[[], Awaitable[Any]],
    wakes: int = 1,
    between: Callable[[], object] = lambda: None,
) -> list[float]:
    """Its image is in the swap store and nowhere else, then back in DRAM, then damaged in the store. Epochs from 5 on.
    Seconds of each wake straight from the store; `between` is called before each and after the last."""
    before, epochs = await ask(), itertools.count(5)
    key, nbytes = bytes.fromhex(filled["key"]), filled["bytes"]
    keeper = SwapKeeper(
        settings(folder / "swap", size_bytes=nbytes + nbytes // 50 + 16 * MiB, slot_bytes=MiB), Events()
    )
    assert await keeper.open()
    assert keeper.service is not None
    try:
        await SwapBroker(keeper, 30.0).introduce(worker)
        put = partial(keeper.service.put_image, saved_s=1.0, rate=1.0, deadline_s=120)
        assert await put(key, MODEL, fd, nbytes) > nbytes
        assert await put(key, MODEL, fd, nbytes) == 0
        place = keeper.service.store.find(key, MODEL)

        took: list[float] = []

        async def there_and_back(place: Place) -> dict[str, Any]:
            said, epoch = json.dumps(place.to_wire()).encode(), next(epochs)
            place_fd = memfd.create("place", len(said))
            os.pwrite(place_fd, said, 0)
            await worker.call("demote", deadline_s=60, epoch=epoch)
            try:
                done = await worker.call("promote", deadline_s=120, epoch=epoch, fd=place_fd)
            finally:
                os.close(place_fd)
            assert await ask() == before
            took.append(done["total_s"])
            return {name: done[name] for name in ("weights_from", "missed") if name in done}

        for _ in range(wakes):
            between()
            assert await there_and_back(place) == {"weights_from": "nvme"}
        between()
        changed = await there_and_back(replace(place, key=MODEL))
        assert changed == {"weights_from": "source", "missed": "changed"}
        # In DRAM once more, it is what it was: asleep, it is taken in place of what was forgotten.
        epoch = next(epochs)
        await worker.call("demote", deadline_s=60, epoch=epoch)
        with pytest.raises(VerbFailed, match="another in every process"):
            await worker.call("image", deadline_s=60, fd=fd, state="ready", key=MODEL.hex())
        await worker.call("image", deadline_s=60, fd=fd, state="ready", key=key.hex())
        assert image_is_mapped(worker.pid, os.fstat(fd).st_ino)
        assert (await worker.call("promote", deadline_s=60, epoch=epoch))["weights_from"] == "dram"
        assert await ask() == before
        await worker.call("drop_image", deadline_s=60)
        damage_all(keeper.service)
        assert await there_and_back(place) == {"weights_from": "source", "missed": "checksum"}
        return took[:wakes]
    finally:
        await keeper.close()


async def asleep_and_back(
    worker: WorkerProcess, hello: Hello, held: Any, spec: WorkerSpec, before: tuple[str, list[float]], epoch: int
) -> None:
    awake_bytes = held()
    gave = await worker.call("demote", deadline_s=60, epoch=epoch)
    assert gave["released_bytes"] > 0.9 * WEIGHTS_BYTES
    assert held() < awake_bytes - 0.95 * WEIGHTS_BYTES
    assert held() < 64 * MiB
    done = await worker.call("promote", deadline_s=120, epoch=epoch)
    assert done["weights_bytes"] == hello.weights_bytes
    assert (await worker.call("canary", deadline_s=60))["ok"]
    assert await text_of(spec.socket_path) == before
    assert held() > 0.95 * WEIGHTS_BYTES


def image_is_mapped(pid: int, inode: int) -> bool:
    """One of its processes has the image mapped."""
    maps = [Path(f"/proc/{member}/maps").read_text() for member in proc.family(pid)]
    return any(re.search(rf"\b{inode} +/memfd:", text) for text in maps)


async def test_an_interpreter_without_vllm_is_refused_for_good(tmp_path: Path) -> None:
    import sys

    with pytest.raises(WorkerNotStarted, match="has no vLLM: set engine_python") as caught:
        await started(tmp_path, spec_in(tmp_path), Path(sys.executable))
    assert caught.value.final


async def test_a_version_that_is_not_known_is_refused_with_those_that_work(tmp_path: Path) -> None:
    import sys

    path = search_path(tmp_path / "path")
    other = tmp_path / "path" / "vllm-0.1.2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1.2\n")
    assert path
    with pytest.raises(WorkerNotStarted, match=r"vLLM 0\.1\.2 is not supported: install one of 0\.26, 0\.32") as caught:
        await started(tmp_path, spec_in(tmp_path), Path(sys.executable))
    assert caught.value.final
