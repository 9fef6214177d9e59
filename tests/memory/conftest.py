from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mball.device.device import Device
from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.pressure_watch import Gauge
from mball.memory.queue import Ticket
from mball.memory.settings import Settings
from mball.memory.slot import Slot
from mball.memory.spec import ModelSpec, WorkerSpec
from mball.swap.store import Settings as SwapSettings
from mball.units import MiB
from tests.fake_worker import Knobs, command

QUICK = Settings(
    start_s=30.0,
    promote_s=20.0,
    demote_s=20.0,
    canary_s=20.0,
    release_s=2.0,
    verb_s=2.0,
    term_s=2.0,
    backoff_s=0.05,
    cool_down_s=0.5,
    max_wait_s=2.0,
    working_bytes=0,
    slack_bytes=8 * MiB,
    sample_s=0.05,
    books_s=0.05,
    foreign_s=0.05,
)
"""Waits that tests can afford."""


def model(name: str, knobs: Knobs | None = None, **options: Any) -> ModelSpec:
    worker = WorkerSpec(model=name, path=f"/models/{name}", max_num_seqs=4)
    return ModelSpec(worker, environment=(knobs or Knobs()).environment(), **options)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="mball-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def device(tmp_path: Path) -> SimulatedDevice:
    """Room for one model of the default knobs (80 MiB) and a bit."""
    return SimulatedDevice.create(tmp_path / "gpu", 120 * MiB, context_bytes=1 * MiB)


def slot_of(manager: Manager) -> Slot:
    """The only device."""
    [slot] = manager._devices
    return slot


class Running:
    """A manager under test, and what it left."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.pids: set[int] = set()

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = next(m for m in self.manager.snapshot()["models"] if m["name"] == name)
        if state["pid"] is not None:
            self.pids.add(state["pid"])
        return state

    async def until(self, condition: Callable[[], bool], deadline_s: float = 120.0) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)

    async def ask(self, name: str, *, deadline_s: float = 60.0) -> str:
        """One chat answer's text, through the worker's socket as the gateway does it."""
        async with self.manager.admit(name, deadline_s=deadline_s) as ticket:
            self.state(name)
            return await post(ticket)


Serve = Callable[..., Awaitable[Running]]


async def post(ticket: Ticket) -> str:
    """The answer; raises aiohttp.ClientError where the worker ends."""
    connector = aiohttp.UnixConnector(ticket.socket_path)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://worker/v1/chat/completions", json={"messages": []}) as response,
    ):
        answer = await response.json()
        assert response.status == 200, answer
        text: str = answer["choices"][0]["message"]["content"]
        return text


@pytest.fixture
async def serve(runtime_dir: Path, device: SimulatedDevice) -> AsyncIterator[Serve]:
    """`await serve(model…, settings=…)`: a running manager on the simulated device, closed at the end of the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *models: ModelSpec,
            settings: Settings = QUICK,
            on: Device | Sequence[Device] | None = None,
            device_bytes: int | None = None,
            dram_bytes: int = 0,
            command_for: Callable[[ModelSpec], list[str]] = lambda spec: command(),
            swap: SwapSettings | None = None,
            gauge: Gauge | None = None,
        ) -> Running:
            chosen = list(on) if isinstance(on, Sequence) else [on or device]
            manager = Manager(
                models,
                [(one, one.total_bytes if device_bytes is None else device_bytes) for one in chosen],
                dram_bytes=dram_bytes,
                runtime_dir=runtime_dir,
                command_for=command_for,
                settings=settings,
                swap=swap,
                gauge=gauge,
            )
            stack.push_async_callback(manager.close, 0.0)
            await manager.start()
            return Running(manager)

        yield start
