"""Stock servers started at one moment on one GPU, each told its share: what happens without an allocator."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import aiohttp
import psutil

from mball.bench.allocator import Options, Together
from mball.device.device import Device, open_device

_DEADLINE_S = 150.0
_POLL_S = 0.25
_TERM_S = 10.0
_ERROR = re.compile(r"\b\w+Error: \S")


@dataclass
class _Server:
    name: str
    process: asyncio.subprocess.Process
    port: int
    log: IO[bytes]
    ready_s: float | None = None

    def last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if _ERROR.search(line) and "WARNING" not in line]
        return [*errors, *lines[-1:], "it said nothing"][0].strip()[-300:]


async def vllm_together(options: Options, python: Path) -> Together:
    """vLLM's server, run by that interpreter, as often as there are models; each is told its share."""
    device = open_device(options.device)
    found = Together()
    with tempfile.TemporaryDirectory(prefix="mball-bench-") as folder:
        began = time.monotonic()
        servers = [await _start(python, options, device, number, Path(folder)) for number in range(options.together)]
        try:
            await _watch(servers, device, options.share_bytes, found, began)
        finally:
            await asyncio.gather(*(_end(server) for server in servers))
        for server in servers:
            if server.ready_s is None:
                found.failures.append(f"{server.name}: {server.last_words()}")
            else:
                found.ready_s.append(server.ready_s)
            server.log.close()
    return found


async def _start(python: Path, options: Options, device: Device, number: int, folder: Path) -> _Server:
    port, log = _free_port(), (folder / f"{number}.log").open("w+b")
    share = options.share_bytes / device.total_bytes
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model)]
    command += ["--gpu-memory-utilization", f"{share:.3f}", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, start_new_session=True)
    return _Server(f"server {number}", process, port, log)


async def _watch(servers: list[_Server], device: Device, share_bytes: int, found: Together, began: float) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while time.monotonic() - began < _DEADLINE_S:
            held = [await asyncio.to_thread(_held, device, server) for server in servers]
            found.over_bytes = max(found.over_bytes, *(nbytes - share_bytes for nbytes in held))
            found.held_bytes = held
            for server in servers:
                if server.ready_s is None and server.process.returncode is None and await _answers(session, server):
                    server.ready_s = time.monotonic() - began
            if all(server.ready_s is not None or server.process.returncode is not None for server in servers):
                break
            await asyncio.sleep(_POLL_S)
    found.seconds = time.monotonic() - began


def _held(device: Device, server: _Server) -> int:
    try:
        parent = psutil.Process(server.process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(device.process_bytes(process.pid) or 0 for process in family)


async def _answers(session: aiohttp.ClientSession, server: _Server) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{server.port}/health") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def _end(server: _Server) -> None:
    """Its whole group: an engine may outlive its server."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.process.pid, number)
            async with asyncio.timeout(_TERM_S):
                await server.process.wait()
        except ProcessLookupError:
            return
        except TimeoutError:
            continue


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
