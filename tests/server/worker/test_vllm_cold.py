"""Layers in vLLM's host memory: what vLLM is told, and what is believed of it. A server that answers as vLLM does."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mball.device import host
from mball.errors import ConfigError, EngineUnsupported, TransitionError
from mball.loader import vllm_compat
from mball.memory import control
from mball.memory.estimate import estimate
from mball.memory.spec import WorkerSpec
from mball.memory.vllm_cold import Cold
from mball.memory.vllm_options import arguments, check_cold
from mball.server.worker.vllm_http import VllmClient
from mball.server.worker.vllm_process import check_fell, cold_layers, host_bytes, run
from mball.server.worker.vllm_verbs import VllmVerbs, describe
from mball.units import GiB, MiB
from tests.server.worker.test_vllm_start import TIMES
from tests.sparse_model import sparse_model

LAYER, REST = 512 * MiB, 1 * GiB
WHOLE = 16 * LAYER + REST


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    path = sparse_model(tmp_path / "m", layers=16, layer_bytes=LAYER, rest_bytes=REST)
    return WorkerSpec(
        "m",
        str(path),
        socket_path=str(tmp_path / "w.sock"),
        device="cuda:GPU-1",
        kv_cache_bytes=1 * GiB,
        engine="vllm",
        resident_layers=8,
    )


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_compat, "version", lambda: "0.26.1")


def test_vllm_is_told_which(spec: WorkerSpec) -> None:
    assert cold_layers(spec) == Cold(16, 8, 2, 1, 1)
    words = " ".join(arguments(spec, 1 * GiB, cold_layers(spec)))
    assert "--offload-backend prefetch --offload-group-size 2 --offload-num-in-group 1" in words
    assert "--offload-prefetch-step 1" in words
    assert cold_layers(replace(spec, resident_layers=16)) is None
    assert "offload" not in " ".join(arguments(spec, 1 * GiB, None))


def test_as_many_stay_as_there_is_room_for(spec: WorkerSpec) -> None:
    auto = replace(spec, resident_layers="auto")
    assert cold_layers(replace(auto, device_memory_bytes=80 * GiB)) is None
    most = estimate(replace(auto, device_memory_bytes=9 * GiB))
    assert most is not None
    assert most.cold is not None
    assert 4 * GiB < most.weights_bytes < 6 * GiB, "beside KV, two GiB of vLLM's own and an eighth"


def test_what_can_not_be_is_refused(spec: WorkerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="for a GPU alone"):
        arguments(replace(spec, device="cpu"), 1)
    with pytest.raises(ConfigError, match="cpu_offload_gb"):
        check_cold(replace(spec, engine_args={"cpu_offload_gb": 3}))
    check_cold(replace(spec, engine_args={"cpu_offload_gb": 0}))
    with pytest.raises(ConfigError, match="its files don't tell"):
        cold_layers(replace(spec, path=str(tmp_path / "none")))
    monkeypatch.setattr(host, "memory_bytes", lambda: 64 * MiB)
    with pytest.raises(ConfigError, match=r"4\.0 GiB of layers to host memory, which is 64\.0 MiB in all"):
        cold_layers(spec)


def test_the_older_runner_of_026_offloads_and_the_newer_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_compat.offload_environment() == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    monkeypatch.setattr(vllm_compat, "version", lambda: "0.32.0+cpu")
    assert vllm_compat.offload_environment() == {}


def test_layers_that_are_on_the_device_all_the_same_are_an_error(spec: WorkerSpec) -> None:
    check_fell(spec, WHOLE - 7 * LAYER + 100 * MiB)
    with pytest.raises(EngineUnsupported, match=r"m: vLLM 0\.26\.1 took the options .* keeps 9"):
        check_fell(spec, WHOLE)
    check_fell(replace(spec, resident_layers=None), WHOLE)
    check_fell(replace(spec, resident_layers=16), WHOLE)


class Child:
    """In the place of vLLM's process."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.environment: Mapping[str, str] = {}

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        self.environment = environment
        return self

    def poll(self) -> int | None:
        return 0 if self.ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("vllm", timeout or 0.0)
        return 0

    def terminate(self) -> None:
        self.ended.set()

    kill = terminate


@contextlib.asynccontextmanager
async def answering(spec: WorkerSpec, weights_bytes: int, asked: list[str]) -> AsyncIterator[None]:
    """At the socket of vLLM's server, whose one process says that it holds so much."""
    held = {"weights_bytes": weights_bytes, "kv_bytes": 1 * GiB, "image_bytes": weights_bytes, "aside_bytes": 0}
    held["free_bytes"] = 70 * GiB
    answers: dict[str, Any] = {
        "mball_stages": {"server_at": 1.0, "stages": TIMES},
        "mball_describe": held,
        "mball_fingerprint": {"fingerprint": "0"},
        "mball_trim": {"cached_bytes": 3 * MiB},
    }

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        if request.path == "/sleep":
            held["free_bytes"] += weights_bytes + 1 * GiB
        if request.path != "/collective_rpc":
            return web.json_response({})
        method = (await request.json())["method"]
        return web.json_response({"results": [answers.get(method, {})]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, spec.socket_path).start()
        yield
    finally:
        await runner.cleanup()


async def test_one_whose_layers_did_not_go_says_no_hello(spec: WorkerSpec) -> None:
    ours, theirs = control.pair()
    child = Child()
    async with answering(spec, WHOLE, []):
        ended = asyncio.create_task(run(theirs.detach(), spec, child))
        with contextlib.closing(control.Channel(ours)) as channel:
            message, _ = await channel.receive()
            assert await ended == 1
    assert message["event"] == "failed"
    assert "took the options for cold layers and keeps 9" in message["error"]
    assert child.ended.is_set()
    assert child.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


async def test_what_it_has_of_host_memory_is_said(spec: WorkerSpec) -> None:
    ours, theirs = control.pair()
    async with answering(spec, WHOLE - 7 * LAYER, []):
        ended = asyncio.create_task(run(theirs.detach(), replace(spec, kv_arena_bytes=1 * MiB), Child()))
        with contextlib.closing(control.Channel(ours)) as channel:
            message, _ = await channel.receive()
        assert await ended == 0
    assert (message["event"], message["host_bytes"]) == ("hello", 8 * LAYER + 1 * MiB)
    assert message["working_bytes"] == 3 * MiB
    assert host_bytes(replace(spec, resident_layers=None)) == host_bytes(replace(spec, resident_layers=16)) == 0


async def test_it_forgets_nothing_when_it_sleeps(spec: WorkerSpec) -> None:
    """What a reload would write is the buffers, with the last layers that pass through them."""
    client, asked = VllmClient(spec.socket_path), list[str]()
    async with answering(spec, WHOLE - 7 * LAYER, asked):
        for one, level in ((spec, 1), (replace(spec, resident_layers=None), 2)):
            verbs = VllmVerbs(one, client, await describe(client), ["0"], lambda: None)
            await verbs.table()["demote"]({"epoch": 1}, None)
            assert f"/sleep?level={level}&mode=wait" in asked
            if level == 1:
                with pytest.raises(TransitionError, match="cold layers"):
                    await verbs.table()["drop_image"]({}, None)
            asked.clear()
