"""A gateway over a real manager, fake workers, and real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from mball.device.simulated import SimulatedDevice
from mball.memory.manager import Manager
from mball.memory.spec import ModelSpec
from mball.server.config import Config
from mball.server.gateway.app import create_app
from mball.server.gateway.live import Live
from mball.server.gateway.protocol import Protocol
from mball.server.run import bind
from tests.fake_worker import command
from tests.memory.conftest import QUICK, device, runtime_dir

__all__ = ["device", "runtime_dir"]


@dataclass
class Gateway:
    manager: Manager
    url: str
    http: aiohttp.ClientSession
    live: Live
    admin_url: str = ""

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = next(m for m in self.manager.snapshot()["models"] if m["name"] == name)
        return state

    async def until(self, condition: Callable[[], bool], deadline_s: float = 120.0) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)


Start = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def gateway(runtime_dir: Path, device: SimulatedDevice) -> AsyncIterator[Start]:
    """`await gateway(model…, **settings of Config)`: a running gateway, stopped at the end of the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*models: ModelSpec, **settings: Any) -> Gateway:
            manager = Manager(
                models,
                [(device, device.total_bytes)],
                dram_bytes=0,
                runtime_dir=runtime_dir,
                command_for=lambda _: command(),
                settings=QUICK,
            )
            config = Config(drain_timeout_s=1.0, **settings)
            live = Live(config)
            sock = bind("127.0.0.1", 0)
            admin = bind("127.0.0.1", 0) if config.admin is not None else sock
            admin_port = admin.getsockname()[1]
            app = create_app(manager, config, live, admin_port=admin_port if config.admin is not None else None)
            server = uvicorn.Server(
                uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, http=Protocol, ws="none")
            )
            running = asyncio.create_task(server._serve([sock] if admin is sock else [sock, admin]))

            async def stop() -> None:
                server.should_exit = True
                async with asyncio.timeout(60):
                    await running

            stack.callback(admin.close)
            stack.callback(sock.close)
            stack.push_async_callback(stop)
            http = await stack.enter_async_context(aiohttp.ClientSession())
            gateway = Gateway(
                manager, f"http://127.0.0.1:{sock.getsockname()[1]}", http, live, f"http://127.0.0.1:{admin_port}"
            )
            await gateway.until(lambda: server.started)
            return gateway

        yield start
