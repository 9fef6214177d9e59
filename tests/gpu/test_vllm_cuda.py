"""vLLM on a GPU: the load format, the sleep backend and the worker.

    MBALL_VLLM_PYTHON=/tmp/vpy python -m pytest tests/gpu/test_vllm_cuda.py -s

MBALL_VLLM_PYTHON is an interpreter that has vLLM and leaves PYTHONPATH as it is, or adds to it. MBALL_VLLM_MODEL is the
model's folder (by default one of random weights, 1 GiB), MBALL_VLLM_RESULTS the file for what was found, line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from mball.bench import raw_disk
from mball.device import memfd
from mball.device.device import Device
from mball.device.group import DeviceGroup
from mball.device.nvml import NvmlDevice
from mball.memory.estimate import estimate
from mball.memory.nursery import Nursery
from mball.memory.process import Hello, WorkerProcess
from mball.memory.settings import Settings
from mball.memory.spec import WorkerSpec
from mball.server.engine_path import search_path
from mball.server.models import random
from mball.units import GiB, MiB
from tests.e2e.test_vllm_lora import RANK, adapter
from tests.server.worker.test_vllm_process import from_the_store
from tests.vllm_bed import bed, damage_all
from tests.vllm_python import vllm_python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WAKES = 5
"""From the store, each beside the disk by itself."""

DEPTHS = (1, 4)
"""Of the disk by itself, all of the image, as a wake reads it: what lies behind a disk may keep a part."""

CHECK = Path(__file__).with_name("vllm_check.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("MBALL_VLLM_MODEL"):
        return Path(named)
    folder = tmp_path_factory.mktemp("models") / "llama"
    random.make("llama", folder, size_bytes=1 * GiB, max_shard_bytes=300 * MiB)
    return folder


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What every stage found, by stage and part."""
    folder = tmp_path_factory.mktemp("check")
    results = Path(os.environ.get("MBALL_VLLM_RESULTS", folder / "results.jsonl"))
    results.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": search_path(folder / "path"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(vllm_python()), str(CHECK), str(model), str(results)], env=environment, check=False)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {(line["stage"], line.get("part", "")): line for line in lines}


def weights_bytes(found: dict[tuple[str, str], dict[str, Any]]) -> int:
    return int(found["versions", ""]["weights_bytes"])


@pytest.mark.parametrize("stage", ["versions", "stock", "mball", "changed", "reload"])
def test_every_stage_ends(found: dict[tuple[str, str], dict[str, Any]], stage: str) -> None:
    ended = found[stage, "ended"]
    assert ended["code"] == 0, ended["tail"]


def test_it_answers_as_stock_vllm_does(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found["mball", "as stock"]["same"]


def test_the_weights_pool_holds_the_weights_and_nothing_else(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    """What the loader reads into is neither in the pool nor still there."""
    described = found["mball", "up"]["described"]
    assert weights_bytes(found) * 0.98 < described["weights_bytes"] < weights_bytes(found) * 1.05 + 64 * MiB


def test_a_sleep_frees_all_and_a_wake_brings_back_the_same(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    swap, described = found["mball", "swap"], found["mball", "up"]["described"]
    assert swap["same"]
    assert swap["fingerprint_same"]
    assert swap["resident_drift"] < 0.01
    assert all(
        cycle["freed_bytes"] > 0.98 * (described["weights_bytes"] + described["kv_bytes"]) for cycle in swap["cycles"]
    )
    assert abs(swap["drift_bytes"]) < 256 * MiB


def test_a_weight_that_was_changed_stays_changed(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found["changed", "image"]["state"] == "ready"
    assert found["changed", "swap"]["differs"]
    assert found["changed", "swap"]["same"]
    assert found["changed", "changed back"]["same"]
    assert found["changed", "without an image"]["same"]


def test_weights_that_were_forgotten_are_read_again(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found["reload", ""]["same"]


def test_ranks_that_read_their_own_parts_say_what_those_that_read_all_say(model: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two GPUs")
    script = Path(__file__).with_name("vllm_ranks.py")
    # Multicast wants what a guest may not have.
    environment = {**os.environ, "PYTHONPATH": search_path(tmp_path / "path"), "NCCL_NVLS_ENABLE": "0"}
    said = []
    for load_format in ("auto", "mball"):
        command = [str(vllm_python()), str(script), str(model), load_format]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
        said.append(json.loads(done.stdout.strip().splitlines()[-1])["tokens"])
    assert said[0] == said[1]


async def text_of(socket_path: str, name: str = "m") -> tuple[str, list[float]]:
    body = {"model": name, "prompt": [5, 6, 7, 8, 9], "max_tokens": 16, "temperature": 0, "logprobs": 1}
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket_path)) as session,
        session.post("http://worker/v1/completions", json=body) as answer,
    ):
        assert answer.status == 200, await answer.text()
        choice = (await answer.json())["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def eager(model: Path, folder: Path, device: Device, **engine_args: Any) -> WorkerSpec:
    return WorkerSpec(
        "m",
        str(model),
        socket_path=str(folder / "w.sock"),
        device=device.name,
        max_model_len=1024,
        max_num_seqs=4,
        kv_cache_bytes=1 * GiB,
        engine="vllm",
        engine_args={"enforce_eager": True, **engine_args},
    )


@contextlib.asynccontextmanager
async def working(spec: WorkerSpec, folder: Path, **more: str) -> AsyncIterator[tuple[WorkerProcess, Hello]]:
    """`more` of its environment."""
    worker, hello = await WorkerProcess.start(
        [str(vllm_python()), "-m", "mball.server.worker.vllm_process"],
        spec,
        extra_environment={"PYTHONPATH": search_path(folder / "path"), **more},
        log=folder / "vllm.log",
        settings=Settings(start_s=500),
    )
    try:
        yield worker, hello
    finally:
        await worker.stop(Settings(verb_s=20))


async def test_its_server_as_a_worker(model: Path, tmp_path: Path) -> None:
    [device, *_] = NvmlDevice.visible()
    spec = eager(model, tmp_path, device)
    free_bytes = device.free_bytes()
    async with working(spec, tmp_path) as (worker, hello):
        before = await text_of(spec.socket_path)
        fd = memfd.create("m", hello.image_bytes)
        try:
            filled = await worker.call("image", deadline_s=120, fd=fd, state="empty")
            memfd.seal(fd)
            took: dict[str, list[float]] = {"sleep_s": [], "wake_s": []}
            for epoch in range(1, 6):
                awake_bytes = device.free_bytes()
                slept = await worker.call("demote", deadline_s=60, epoch=epoch)
                assert device.free_bytes() - awake_bytes > 0.95 * (hello.weights_bytes + hello.kv_bytes)
                woke = await worker.call("promote", deadline_s=60, epoch=epoch)
                took["sleep_s"].append(round(slept["total_s"], 4))
                took["wake_s"].append(round(woke["total_s"], 4))
                assert (await worker.call("canary", deadline_s=60))["ok"]
                assert await text_of(spec.socket_path) == before
            await worker.call("drop_image", deadline_s=60)
            # It may go while the weights are in it alone.
            await worker.call("image", deadline_s=60, fd=fd, state="ready", key=filled["key"])
            await worker.call("demote", deadline_s=60, epoch=5)
            await worker.call("drop_image", deadline_s=60)
            assert (await worker.call("promote", deadline_s=60, epoch=5))["weights_from"] == "source"
            assert await text_of(spec.socket_path) == before
            stretch, passes = raw_disk.Stretch(str(tmp_path / "swap"), 0, filled["bytes"]), list[raw_disk.Rates]()

            def bare() -> None:
                passes.append(raw_disk.rates([stretch], 30.0, DEPTHS[:: -1 if len(passes) % 2 else 1]))

            from_store_s = await from_the_store(
                worker,
                filled,
                fd,
                tmp_path,
                partial(text_of, spec.socket_path),
                WAKES,
                bare,
            )
        finally:
            os.close(fd)
        depth, rate = raw_disk.best(passes)
        told = {"bytes": filled["bytes"], "fill_s": filled["fill_s"], "from_store_s": from_store_s}
        print(json.dumps({**told, **took, "disk": {"depth": depth, "bytes_s": rate, "passes": passes}}))  # noqa: T201
    assert free_bytes - device.free_bytes() < 256 * MiB


async def test_a_model_on_two_gpus_sleeps_and_wakes_on_both(model: Path, tmp_path: Path) -> None:
    gpus = NvmlDevice.visible()[:2]
    if len(gpus) < 2:
        pytest.skip("it takes two GPUs")
    group = DeviceGroup(gpus)
    spec = eager(model, tmp_path, group, tensor_parallel_size=2)
    found = estimate(spec)
    assert found is not None
    async with working(spec, tmp_path, NCCL_NVLS_ENABLE="0") as (worker, hello):
        assert hello.weights_bytes == pytest.approx(found.weights_bytes, rel=0.1, abs=64 * MiB)
        before = await text_of(spec.socket_path)
        fd = memfd.create("m", hello.image_bytes)
        try:
            await worker.call("image", deadline_s=120, fd=fd, state="empty")
            memfd.seal(fd)
            took: dict[str, list[float]] = {"sleep_s": [], "wake_s": []}
            for epoch in range(1, 4):
                awake = [gpu.free_bytes() for gpu in gpus]
                slept = await worker.call("demote", deadline_s=60, epoch=epoch)
                gives = 0.95 * (hello.weights_bytes + hello.kv_bytes)
                assert all(gpu.free_bytes() - was > gives for gpu, was in zip(gpus, awake, strict=True))
                woke = await worker.call("promote", deadline_s=60, epoch=epoch)
                took["sleep_s"].append(round(slept["total_s"], 4))
                took["wake_s"].append(round(woke["total_s"], 4))
                assert await text_of(spec.socket_path) == before
            print(json.dumps({"weights_bytes": hello.weights_bytes, **took}))  # noqa: T201
        finally:
            os.close(fd)


async def test_adapters_sleep_and_wake_with_their_base(model: Path, tmp_path: Path) -> None:
    [device, *_] = NvmlDevice.visible()
    modules = [f"{name}={adapter(tmp_path / name, model, seed)}" for seed, name in enumerate(("formal", "brief"))]
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2, "lora_modules": modules}
    spec = eager(model, tmp_path, device, **lora)
    async with working(spec, tmp_path) as (worker, hello):
        before = [await text_of(spec.socket_path, name) for name in ("m", "formal", "brief")]
        assert len({tuple(logprobs) for _, logprobs in before}) == 3
        fd = memfd.create("m", hello.image_bytes)
        try:
            for epoch in (1, 2):
                slept = await worker.call("demote", deadline_s=120, epoch=epoch)
                # Without an image all lies aside, as a reload would lose the adapters; with one what has changed.
                assert (slept["host_bytes"] > 0.9 * hello.weights_bytes) == (epoch == 1)
                woke = await worker.call("promote", deadline_s=120, epoch=epoch)
                assert woke["host_bytes"] == 0
                assert [await text_of(spec.socket_path, name) for name in ("m", "formal", "brief")] == before
                if epoch == 1:
                    await worker.call("image", deadline_s=120, fd=fd, state="empty")
                    memfd.seal(fd)
        finally:
            os.close(fd)


async def test_a_forked_worker_says_what_a_fresh_one_does(model: Path, tmp_path: Path) -> None:
    """Its engine begins CUDA after the forks; without `enforce_eager` it compiles and captures, too."""
    [device, *_] = NvmlDevice.visible()
    command = (str(vllm_python()), "-m", "mball.server.worker.vllm_process")
    line, path = [command[0], "-m", "mball.server.worker.vllm_zygote"], search_path(tmp_path / "path")
    settings = Settings(start_s=500, verb_s=20)
    said: dict[str, tuple[str, list[float]]] = {}
    for name, zygotes in (("fresh", {}), ("forked", {command: line})):
        nursery = Nursery(zygotes, settings, tmp_path, tmp_path, {command: path})
        await nursery.open()
        try:
            spec = WorkerSpec(
                "m",
                str(model),
                socket_path=str(tmp_path / f"{name}.sock"),
                device=device.name,
                max_model_len=1024,
                max_num_seqs=4,
                kv_cache_bytes=1 * GiB,
                engine="vllm",
            )
            worker, hello = await WorkerProcess.start(
                command,
                spec,
                extra_environment={"PYTHONPATH": path},
                log=tmp_path / f"{name}.log",
                settings=settings,
                launch=nursery.launch,
            )
            try:
                said[name] = await text_of(spec.socket_path)
                title = Path(f"/proc/{worker.pid}/cmdline").read_text()
                assert title.startswith("mball.server.worker") == bool(zygotes), (tmp_path / "zygote-0.log").read_text()
                await worker.call("demote", deadline_s=60, epoch=1)
                await worker.call("promote", deadline_s=120, epoch=1)
                assert await text_of(spec.socket_path) == said[name]
            finally:
                await worker.stop(settings)
        finally:
            await nursery.close()
        print(json.dumps({name: dict(hello.stages)}))  # noqa: T201
    assert said["forked"] == said["fresh"]


async def test_its_kv_goes_to_the_store_and_comes_back(model: Path, tmp_path: Path) -> None:
    [device, *_] = NvmlDevice.visible()
    room = shutil.disk_usage("/dev/shm").free // 2
    if room < 64 * MiB:
        pytest.skip(f"/dev/shm has room for {2 * room} bytes")
    spec = WorkerSpec(
        "m",
        str(model),
        socket_path=str(tmp_path / "1.sock"),
        device=device.name,
        max_model_len=4096,
        max_num_seqs=4,
        kv_cache_bytes=1 * GiB,
        kv_arena_bytes=min(4 * GiB, room),
        engine="vllm",
        engine_args={"enforce_eager": True},
    )
    prompt = [(7 * number) % 200 + 5 for number in range(int(os.environ.get("MBALL_VLLM_KV_TOKENS", "2000")))]
    found: dict[str, Any] = {}
    async with bed(tmp_path, spec, 4 * GiB) as first:
        # What is there already leaves the rest to be computed in other pieces, with other rounding.
        cold, cached = await first.ask(prompt)
        assert cached == 0
        warm, cached = await first.ask(prompt)
        assert cached >= len(prompt) - 32
        found["stored"] = await first.until("stored_blocks", len(prompt) // 16 - 1)
        for _ in range(3):
            await first.forgets()
            began = time.perf_counter()
            again, cached = await first.ask(prompt)
            found["restored_s"] = round(time.perf_counter() - began, 3)
            assert again == warm
            assert cached >= len(prompt) - 32
            # Nothing of it is there for another tenant.
            began = time.perf_counter()
            assert (await first.ask(prompt, f"tenant {first.epoch}")) == (cold, 0)
            found["computed_s"] = round(time.perf_counter() - began, 3)
    async with bed(tmp_path, replace(spec, socket_path=str(tmp_path / "2.sock")), 4 * GiB) as second:
        again, cached = await second.ask(prompt)
        assert again == warm
        assert cached >= len(prompt) - 32
        await second.forgets()
        damage_all(second.service)
        assert await second.ask(prompt) == (cold, 0)
        found["damaged"] = await second.counts()
        assert found["damaged"]["failed_loads"] >= 1
    print(json.dumps(found))  # noqa: T201


async def test_cold_layers_leave_the_device_and_change_no_token(model: Path, tmp_path: Path) -> None:
    """By graphs, as both runners of vLLM copy the layers within them; nothing is compiled, so as to start sooner."""
    [device, *_] = NvmlDevice.visible()
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    spec = WorkerSpec(
        "m",
        str(model),
        device=device.name,
        max_model_len=1024,
        max_num_seqs=4,
        kv_cache_bytes=1 * GiB,
        engine="vllm",
        engine_args={"compilation_config": graphs},
    )
    layers = int(json.loads((model / "config.json").read_text())["num_hidden_layers"])
    said: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, resident in (("whole", None), ("cold", layers // 2)):
        one = replace(spec, socket_path=str(tmp_path / f"{name}.sock"), resident_layers=resident)
        before_bytes = device.free_bytes()
        worker, hello = await WorkerProcess.start(
            [str(vllm_python()), "-m", "mball.server.worker.vllm_process"],
            one,
            # The same runner for both, as each has logprobs of its own rounding.
            extra_environment={"PYTHONPATH": search_path(tmp_path / "path"), "VLLM_USE_V2_MODEL_RUNNER": "0"},
            log=tmp_path / f"{name}.log",
            settings=Settings(start_s=500),
        )
        try:
            assert (await worker.call("canary", deadline_s=60))["ok"]
            said[name] = await text_of(one.socket_path)
            began = time.perf_counter()
            await text_of(one.socket_path)
            found[name] = {
                "weights_bytes": hello.weights_bytes,
                "device_bytes": before_bytes - device.free_bytes(),
                "text_s": round(time.perf_counter() - began, 3),
            }
            if resident is not None:
                await sleeps_and_wakes(worker, device, hello, partial(text_of, one.socket_path), said[name])
        finally:
            await worker.stop(Settings(verb_s=20))
    print(json.dumps({"cold layers": found, "layers": layers}))  # noqa: T201
    expected = estimate(replace(spec, resident_layers=layers // 2))
    assert expected is not None
    assert abs(found["cold"]["weights_bytes"] - expected.weights_bytes) < 0.05 * expected.weights_bytes + 64 * MiB
    fell = found["whole"]["device_bytes"] - found["cold"]["device_bytes"]
    assert fell > 0.8 * (found["whole"]["weights_bytes"] - expected.weights_bytes)
    assert said["cold"] == said["whole"]


async def sleeps_and_wakes(
    worker: WorkerProcess, device: NvmlDevice, hello: Hello, ask: Callable[[], Awaitable[Any]], said: Any
) -> None:
    """Without an image, and with one."""
    fd = memfd.create("m", hello.image_bytes)
    try:
        for epoch in (1, 2, 3, 4):
            if epoch == 3:
                await worker.call("image", deadline_s=120, fd=fd, state="empty")
                memfd.seal(fd)
            awake_bytes = device.free_bytes()
            await worker.call("demote", deadline_s=60, epoch=epoch)
            assert device.free_bytes() - awake_bytes > 0.95 * (hello.weights_bytes + hello.kv_bytes)
            await worker.call("promote", deadline_s=60, epoch=epoch)
            assert await ask() == said
    finally:
        os.close(fd)
