"""Real worker processes: a real socket, a real control channel, real (small) models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from mball.device import memfd
from mball.device.proc import private_bytes
from mball.errors import VerbFailed
from mball.memory import control
from mball.memory.launch import environment
from mball.memory.spec import WorkerSpec
from mball.units import MiB
from tests.demo_models import demo_model
from tests.server.worker.conftest import until

WAIT_S = 120.0

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Worker:
    """One worker process and the manager's end of its channel."""

    process: subprocess.Popen[bytes]
    caller: control.Caller
    spec: WorkerSpec
    http: httpx.AsyncClient
    events: list[dict[str, Any]] = field(default_factory=list)

    async def call(self, verb: str, fd: int | None = None, **arguments: Any) -> dict[str, Any]:
        return await self.caller.call(verb, deadline_s=WAIT_S, fd=fd, **arguments)

    async def until_status(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while not condition(status := await self.call("status")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return status

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    def event(self, name: str) -> dict[str, Any] | None:
        return next((event for event in self.events if event["event"] == name), None)

    @property
    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url="http://worker/v1", api_key="none", http_client=self.http, max_retries=0, timeout=WAIT_S
        )


@contextlib.asynccontextmanager
async def started(spec: WorkerSpec, folder: Path) -> AsyncIterator[Worker]:
    """From its start to its end; yields once it said hello, failed or ended."""
    spec = replace(spec, socket_path=str(folder / f"{spec.model}.sock"))
    ours, theirs = control.pair()
    events: list[dict[str, Any]] = []
    with theirs, (folder / f"{spec.model}.log").open("wb") as log:
        command = [sys.executable, "-m", "mball.server.worker"]
        process = subprocess.Popen(  # noqa: ASYNC220
            [*command, "--control-fd", str(theirs.fileno()), "--spec", spec.to_json()],
            pass_fds=[theirs.fileno()],
            stderr=log,
            env=environment(spec, {}),
        )
    caller = control.Caller(control.Channel(ours), events.append)
    http = httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=spec.socket_path), base_url="http://worker", timeout=WAIT_S
    )
    worker = Worker(process, caller, spec, http, events)
    try:
        async with http:
            await until(lambda: bool(events) or process.poll() is not None, WAIT_S)
            yield worker
    finally:
        await caller.close()
        if process.poll() is None:
            process.kill()
        await worker.exit_code()


@pytest.fixture
def spec(tiny_model: Path) -> WorkerSpec:
    return WorkerSpec(model="tiny", path=str(tiny_model), max_num_seqs=4, max_model_len=1024)


async def chat(worker: Worker, **fields: Any) -> httpx.Response:
    body = {"model": worker.spec.model, "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    return await worker.http.post("/v1/chat/completions", json=body)


async def test_a_worker_gives_memory_back_while_it_answers(spec: WorkerSpec, tmp_path: Path) -> None:
    async with started(spec, tmp_path) as worker:
        await worker.call("promote", epoch=1)
        expected = [(await chat(worker, max_tokens=60, seed=seed)).json()["choices"] for seed in range(3)]
        whole = (await worker.call("status"))["kv_bytes"]
        answers = [asyncio.ensure_future(chat(worker, max_tokens=60, seed=seed)) for seed in range(3)]
        sizes = (whole // 2, 0, whole // 3, whole // 2)
        for nbytes in sizes:
            ballooned = await worker.call("balloon", bytes=nbytes, epoch=1)
            status = await worker.call("status")
            assert ballooned["ballooned_bytes"] == status["ballooned_bytes"] == whole - status["kv_bytes"] >= nbytes
        assert [(await answer).json()["choices"] for answer in answers] == expected
        for wrong in ({"bytes": "many"}, {"bytes": -1}, {"bytes": whole * 2}, {"bytes": 0, "epoch": 0}):
            with pytest.raises(VerbFailed, match="balloon"):
                await worker.call("balloon", **{"epoch": 1, **wrong})
        assert await worker.call("threads", threads=1) == {}
        for threads in (0, "x"):
            with pytest.raises(VerbFailed, match="threads"):
                await worker.call("threads", threads=threads)
        assert (await chat(worker)).status_code == 200


async def test_a_life(spec: WorkerSpec, tmp_path: Path) -> None:
    async with started(spec, tmp_path) as worker:
        hello = worker.event("hello")
        assert hello is not None
        assert hello["pid"] == worker.process.pid
        assert min(hello[f"{name}_bytes"] for name in ("baseline", "weights", "kv", "working", "image")) > 0
        assert stat.S_IMODE(Path(worker.spec.socket_path).stat().st_mode) == 0o600

        answer = await chat(worker)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_resident")
        promoted = await worker.call("promote", epoch=1)
        assert promoted["weights_bytes"] == hello["weights_bytes"]
        assert promoted["kv_bytes"] == hello["kv_bytes"]
        assert (await worker.call("canary"))["ok"] is True
        first = await chat(worker)
        assert first.status_code == 200, first.text
        await worker.until_status(lambda s: (s["resident"], s["in_flight"], s["running"]) == (True, 0, 0))

        demoted = await worker.call("demote", epoch=1)
        assert demoted["released_bytes"] == promoted["weights_bytes"] + promoted["kv_bytes"]
        assert (await chat(worker)).status_code == 503
        with pytest.raises(VerbFailed, match="canary"):
            await worker.call("canary")
        await worker.call("promote", epoch=2)
        again = await chat(worker)
        assert again.json()["choices"] == first.json()["choices"]
        assert again.json()["system_fingerprint"] == first.json()["system_fingerprint"]

        with pytest.raises(VerbFailed, match="epoch 1 has ended"):
            await worker.call("demote", epoch=1)
        assert (await chat(worker)).status_code == 200
        assert await worker.call("stop") == {}
        assert await worker.exit_code() == 0
        assert not Path(worker.spec.socket_path).exists()


async def test_images(spec: WorkerSpec, tmp_path: Path) -> None:
    async with started(spec, tmp_path) as worker:
        hello = worker.event("hello")
        assert hello is not None
        await worker.call("promote", epoch=1)
        before = (await chat(worker)).json()["choices"]
        image = memfd.create("tiny", hello["image_bytes"])
        try:
            filled = await worker.call("image", fd=image, state="empty")
            assert 0 < filled["bytes"] <= hello["image_bytes"]
            memfd.seal(image)
            await worker.call("demote", epoch=1)
            # Now the image is what it loads from.
            for shard in Path(spec.path).glob("*.safetensors"):
                shard.rename(shard.with_suffix(".away"))
            try:
                await worker.call("promote", epoch=1)
                assert (await chat(worker)).json()["choices"] == before
            finally:
                for shard in Path(spec.path).glob("*.away"):
                    shard.rename(shard.with_suffix(".safetensors"))
            await worker.call("drop_image")
            with pytest.raises(VerbFailed, match="'empty' or 'ready'"):
                await worker.call("image", fd=image, state="half")
            with pytest.raises(VerbFailed, match="no descriptor"):
                await worker.call("image", state="ready")
            with pytest.raises(VerbFailed, match="takes none"):
                await worker.call("canary", fd=image)
            names = [str(entry.readlink()) for entry in Path(f"/proc/{worker.process.pid}/fd").iterdir()]
            assert not [name for name in names if "memfd" in name]
            await worker.call("image", fd=image, state="ready")
            assert (await worker.call("status"))["resident"] is True
        finally:
            os.close(image)


async def test_a_demotion_gives_the_memory_back(tmp_path: Path) -> None:
    model = demo_model("smollm2-135m")
    async with started(WorkerSpec(model="smollm2", path=str(model), max_num_seqs=2), tmp_path) as worker:
        hello = worker.event("hello")
        assert hello is not None
        api = worker.openai
        texts = []
        for epoch in (1, 2):
            promoted = await worker.call("promote", epoch=epoch)
            whole = await api.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=10, temperature=0)
            texts.append(whole.choices[0].message.content)
            held = private_bytes(worker.process.pid) or 0
            assert held - hello["baseline_bytes"] > promoted["weights_bytes"]
            demoted = await worker.call("demote", epoch=epoch)
            assert demoted["private_bytes"] - hello["baseline_bytes"] < 64 * MiB
        assert "Paris" in texts[0]
        assert texts[0] == texts[1]
        await worker.call("promote", epoch=3)
        stream = await api.chat.completions.create(
            model="smollm2", messages=HELLO, max_tokens=10, temperature=0, stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == texts[0]


async def test_embeddings(tmp_path: Path) -> None:
    model = demo_model("all-minilm-l6-v2")
    async with started(WorkerSpec(model="minilm", path=str(model), task="embed"), tmp_path) as worker:
        await worker.call("promote", epoch=1)
        assert (await worker.call("canary"))["ok"] is True
        texts = ["a cat sleeps", "a kitten naps", "quarterly revenue fell"]
        answer = await worker.openai.embeddings.create(model="minilm", input=texts)
        cat, kitten, revenue = (entry.embedding for entry in answer.data)

        def cosine(a: list[float], b: list[float]) -> float:
            return sum(x * y for x, y in zip(a, b, strict=True))

        assert abs(cosine(cat, cat) - 1) < 1e-3
        assert cosine(cat, kitten) > cosine(cat, revenue) + 0.3
        assert (await worker.call("demote", epoch=1))["released_bytes"] > 0
        with pytest.raises(openai.InternalServerError, match="not on the device"):
            await worker.openai.embeddings.create(model="minilm", input="x")


async def test_a_client_that_leaves_frees_its_slot(spec: WorkerSpec, tmp_path: Path) -> None:
    async with started(spec, tmp_path) as worker:
        await worker.call("promote", epoch=1)
        took: dict[bool, float] = {}
        # Within a second; the machine may stall, so the best of three.
        for stream in (True, False) * 3:
            async with httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=worker.spec.socket_path), base_url="http://worker"
            ) as client:
                body = {"model": "tiny", "prompt": "a", "n": 2, "max_tokens": 900, "ignore_eos": True, "stream": stream}
                task = asyncio.create_task(client.post("/v1/completions", json=body, timeout=WAIT_S))
                await worker.until_status(lambda status: status["running"] == 2)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            left = time.monotonic()
            status = await worker.until_status(lambda status: not status["running"] and not status["in_flight"])
            took[stream] = min(time.monotonic() - left, took.get(stream, WAIT_S))
            assert status["kv_blocks_free"] == status["kv_blocks_total"]
        assert max(took.values()) < 1


@pytest.mark.parametrize("how", ["stop", "signal", "channel"])
async def test_whatever_ends_it_answers_are_ended_and_nothing_is_left(
    spec: WorkerSpec, tmp_path: Path, how: str
) -> None:
    async with started(spec, tmp_path) as worker:
        await worker.call("promote", epoch=1)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
        async with worker.http.stream("POST", "/v1/completions", json=body) as stream:
            lines = (line async for line in stream.aiter_lines() if line)
            await anext(lines)
            match how:
                case "stop":
                    await worker.call("stop")
                case "signal":
                    worker.process.send_signal(signal.SIGTERM)
                case "channel":
                    await worker.caller.close()
            rest = [line async for line in lines]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert await worker.exit_code() == 0
        assert not Path(worker.spec.socket_path).exists()


@pytest.mark.parametrize("fault", ["no folder", "no weights", "truncated"])
async def test_a_model_that_cannot_be_opened(spec: WorkerSpec, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    if fault != "no folder":
        folder.mkdir()
        for file in Path(spec.path).iterdir():
            data = file.read_bytes()
            if file.suffix == ".safetensors":
                if fault == "no weights":
                    continue
                data = data[:-100]
            (folder / file.name).write_bytes(data)
    async with started(replace(spec, path=str(folder)), tmp_path) as worker:
        failed = worker.event("failed")
        assert failed is not None
        assert str(folder) in failed["error"]
        assert worker.event("hello") is None
        assert await worker.exit_code() == 1


async def test_it_dies_with_its_parent(spec: WorkerSpec, tmp_path: Path) -> None:
    parent = (
        "import socket, subprocess, sys, time\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "child = subprocess.Popen([sys.executable, '-m', 'mball.server.worker', '--control-fd', str(theirs.fileno()),"
        " '--spec', sys.argv[1]], pass_fds=[theirs.fileno(), ours.fileno()])\n"
        "ours.recv(65536)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    spec = replace(spec, socket_path=str(tmp_path / "w.sock"))
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", parent, spec.to_json()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    child = 0
    assert process.stdout is not None
    try:
        child = int(await asyncio.to_thread(process.stdout.readline))
        # The worker holds both ends of its channel, so that only its parent's death is left to tell it.
        assert private_bytes(child)
        process.kill()
        await until(lambda: private_bytes(child) is None)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        if child and private_bytes(child) is not None:
            os.kill(child, signal.SIGKILL)


async def test_wrong_verbs_and_a_log_without_texts(spec: WorkerSpec, tmp_path: Path) -> None:
    async with started(spec, tmp_path) as worker:
        with pytest.raises(VerbFailed, match="unknown verb"):
            await worker.call("dance")
        with pytest.raises(VerbFailed, match="epoch"):
            await worker.call("promote", epoch="later")
        # Verbs that come together are done one after the other.
        verbs = ("promote", "demote", "promote", "demote", "promote")
        answers = await asyncio.gather(*(worker.call(verb, epoch=1) for verb in verbs))
        assert all("total_s" in answer for answer in answers)
        assert (await worker.call("status"))["resident"] is True
        await chat(worker, messages=[{"role": "user", "content": "xyzzysecret"}])
        await chat(worker, messages=[{"role": "user", "content": "xyzzysecret"}], temperature=9)
        await worker.call("stop")
        await worker.exit_code()
    lines = (tmp_path / "tiny.log").read_text().splitlines()
    assert all(json.loads(line)["event"] for line in lines)
    assert sum(json.loads(line)["event"] == "request" for line in lines) == 2
    assert not [line for line in lines if "xyzzysecret" in line]
