"""Real models whose images leave DRAM for a swap store, and come back from there with the same text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from mball.device.proc import family
from mball.loader.checkpoint import Checkpoint
from mball.memory.manager import Manager
from mball.memory.pressure_watch import Gauge
from mball.server.catalog import build_manager
from mball.server.config import load_config
from mball.server.gateway.app import create_app
from mball.server.run import bind, running_server
from mball.units import GiB
from tests.e2e.conftest import Serve

CHAT = "smollm2-135m"
EMBEDDER = "all-minilm-l6-v2"
PLENTY = 1024 * GiB


def options(folder: Path, **swap: Any) -> dict[str, Any]:
    return {
        "device_memory_bytes": "500MiB",
        "dram_bytes": "280MiB",
        "state_dir": str(folder / "state"),
        "swap": {"path": str(folder / "swap"), "size_bytes": "400MiB", "weights": "always", **swap},
    }


def chat_model(path: Path) -> dict[str, Any]:
    return {"path": str(path), "kv_cache_memory_bytes": "40MiB", "max_num_seqs": 1}


def asked(url: str, name: str) -> Any:
    """What the model answers: a text, or a vector."""
    bodies: dict[str, dict[str, Any]] = {
        "embeddings": {"input": "a text"},
        "completions": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    }
    path = "embeddings" if name == EMBEDDER else "completions"
    answer = httpx.post(f"{url}/v1/{path}", json={"model": name, **bodies[path]}, timeout=300).raise_for_status().json()
    return answer["data"][0]["embedding"] if name == EMBEDDER else answer["choices"][0]["text"]


def state_of(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/mball/v1/state", timeout=60).json())


def came_from(state: dict[str, Any], name: str) -> str:
    """Where its last promotion had the weights from."""
    promoted = [e for e in state["events"] if e["kind"] == "promoted" and e["model"] == name]
    return str(promoted[-1]["weights_from"])


def was_stored(state: dict[str, Any], name: str) -> bool:
    """Whether its last promotion had the weights from the store, straight or by way of DRAM."""
    ready = [e for e in state["events"] if e["kind"] == "image ready" and e["model"] == name]
    came = came_from(state, name)
    return came == "nvme" or (came == "dram" and ready[0]["filled_from"] == "nvme")


@dataclass
class Here:
    """A whole server in this process, on a host that is short of memory when told to be."""

    manager: Manager
    url: str
    available: list[int]

    async def ask(self, name: str) -> Any:
        return await asyncio.to_thread(asked, self.url, name)

    def state(self) -> dict[str, Any]:
        return self.manager.snapshot()

    def model(self, name: str) -> dict[str, Any]:
        return next(m for m in self.state()["models"] if m["name"] == name)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event.as_dict() for event in self.manager.events.recent(1024) if event.kind == kind]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)

    async def put_away(self, name: str) -> None:
        """Off the device, and out of DRAM: nobody has its image open or mapped any more."""
        self.available[0] = PLENTY
        await self.until(lambda: bool(self.model(name)["image_ready"]))
        assert held(name)
        await self.manager.unload(name)
        self.available[0] = 0
        await self.until(lambda: not self.model(name)["image_ready"])
        await self.until(lambda: not held(name))
        assert self.state()["dram"]["image_bytes"] == 0


@contextlib.asynccontextmanager
async def server(folder: Path, *models: dict[str, Any], **changed: Any) -> AsyncIterator[Here]:
    config = load_config(flags={"models": list(models), **options(folder), **changed})
    available = [PLENTY]
    with tempfile.TemporaryDirectory(prefix="mball-") as runtime, contextlib.closing(bind("127.0.0.1", 0)) as sock:
        gauge = Gauge(folder / "none", available=lambda: available[0])
        manager = build_manager(config, Path(runtime), gauge=gauge)
        serving = uvicorn.Server(uvicorn.Config(create_app(manager, config), log_config=None))
        running = asyncio.create_task(serving._serve([sock]))
        here = Here(manager, f"http://127.0.0.1:{sock.getsockname()[1]}", available)
        try:
            await here.until(lambda: serving.started and (here.state()["swap"] or {}).get("state") != "opening")
            yield here
        finally:
            serving.should_exit = True
            async with asyncio.timeout(120):
                await running


def held(name: str) -> list[str]:
    """Who of this process and those below it has the memory of a model's image."""
    found, image = [], f"/memfd:{name} (deleted)"
    for process in [Path(f"/proc/{pid}") for pid in family(os.getpid())]:
        with contextlib.suppress(OSError):
            if image in (process / "maps").read_text() or image in [_link(fd) for fd in (process / "fd").iterdir()]:
                found.append(process.name)
    return found


def _link(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def mball(*arguments: str) -> tuple[int, str]:
    """Its exit code, and what it says."""
    done = subprocess.run([sys.executable, "-m", "mball", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def flip_bytes(path: Path) -> None:
    with path.open("r+b") as file:
        for at in range(8 << 20, path.stat().st_size, 8 << 20):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("name", [CHAT, EMBEDDER])
async def test_weights_go_to_the_store_once_and_come_back(
    serve: Serve, models_dir: Path, tmp_path: Path, name: str
) -> None:
    served = chat_model(models_dir / name) if name == CHAT else {"path": str(models_dir / name)}
    async with server(tmp_path, served) as here:
        expected = await here.ask(name)
        written = []
        for _ in range(2):
            await here.put_away(name)
            assert here.model(name)["shown_as"] == "nvme"
            written.append(here.state()["swap"]["counters"]["written_bytes"])
            assert await here.ask(name) == expected
            assert came_from(here.state(), name) == "nvme"
        assert written[0] > Checkpoint.open(models_dir / name).nbytes
        assert written == [written[0]] * 2
        assert not here.events("image missed")
        assert here.state()["books_wrong"] == []
    with serve([served], **options(tmp_path)) as second:
        assert asked(second.url, name) == expected
        assert was_stored(state_of(second.url), name)
        code, shown = mball("ps", "--url", second.url)
        assert code == 0
        assert "1 images" in shown
        # No way to say goodbye: what is committed is there for the next all the same.
        os.kill(second.pid, signal.SIGKILL)
    with serve([served], **options(tmp_path)) as third:
        assert asked(third.url, name) == expected
        state = state_of(third.url)
        assert was_stored(state, name)
        assert not state["swap"]["counters"].keys() & {"writes", "remade", "index_damaged"}


async def test_a_flipped_byte_in_the_store_changes_no_text(models_dir: Path, tmp_path: Path) -> None:
    served = chat_model(models_dir / CHAT)
    async with server(tmp_path, served) as here:
        expected = await here.ask(CHAT)
        await here.put_away(CHAT)
        flip_bytes(tmp_path / "swap")
        assert await here.ask(CHAT) == expected
        assert came_from(here.state(), CHAT) == "source"
        assert here.state()["swap"]["counters"]["misses:checksum"] == 1
        [missed] = here.events("image missed")
        assert "checksum" in missed["reason"]
        assert not here.model(CHAT)["stored"]


@pytest.mark.parametrize("restarted", [False, True])
async def test_changed_files_are_never_served_from_the_image_of_the_old_ones(
    models_dir: Path, tmp_path: Path, restarted: bool
) -> None:
    shutil.copytree(models_dir / CHAT, tmp_path / CHAT)
    served, checkpoint = chat_model(tmp_path / CHAT), Checkpoint.open(tmp_path / CHAT)
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    file = checkpoint.shards[tensor.shard].path
    async with server(tmp_path, served) as here:
        old = await here.ask(CHAT)
        await here.put_away(CHAT)
        before = file.stat()
        with file.open("r+b") as weights:
            weights.seek(tensor.start)
            weights.write(bytes(tensor.nbytes // 2))
        # The size, the header and the time of the last change are what they were.
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        if restarted:
            os.kill(here.model(CHAT)["pid"], signal.SIGKILL)
            await here.until(lambda: here.model(CHAT)["process"] == "gone")
        new = await here.ask(CHAT)
        assert came_from(here.state(), CHAT) == "source"
        if not restarted:
            assert "changed" in here.events("image missed")[0]["reason"]
    async with server(tmp_path, served, swap=None) as fresh:
        assert await fresh.ask(CHAT) == new != old


def test_a_second_server_is_refused_the_store_and_serves(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    embedder = [{"path": str(models_dir / EMBEDDER)}]
    with serve(embedder, **options(tmp_path)) as first:
        (tmp_path / "second").mkdir()
        config = {"models": embedder, **options(tmp_path), "state_dir": str(tmp_path / "second")}
        (tmp_path / "second.yaml").write_text(json.dumps(config))
        with running_server(["--config", str(tmp_path / "second.yaml")], log=tmp_path / "second.log") as second:
            assert asked(second.url, EMBEDDER)
            swap = state_of(second.url)["swap"]
            assert swap["state"] == "unavailable"
            assert f"pid {first.pid}" in swap["error"]
            assert state_of(first.url)["swap"]["state"] == "open"
