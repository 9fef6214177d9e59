"""A server that is told to end while it is under load, once and twice (fault 20)."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest

from mball.server.run import bind

PATH = "/v1/chat/completions"
DEADLINE_S = 60.0


@dataclass
class Served:
    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession

    def body(self, *, chunks: int, pace_ms: int) -> dict[str, object]:
        text = f"chunks={chunks} pace_ms={pace_ms}"
        return {"model": "bench", "messages": [{"role": "user", "content": text}], "stream": True}

    async def stream(self, chunks: int, pace_ms: int, begun: asyncio.Event | None = None) -> tuple[int, bytes]:
        """Its status and all that came; a connection that broke has b"cut" at the end."""
        content = b""
        try:
            async with self.http.post(self.url + PATH, json=self.body(chunks=chunks, pace_ms=pace_ms)) as response:
                async for part in response.content.iter_any():
                    content += part
                    if begun is not None:
                        begun.set()
                return response.status, content
        except aiohttp.ClientError:
            return 0, content + b"cut"


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Served]:
    """A real server with a real worker process that answers at once. Short enough a folder for unix sockets."""
    key = secrets.token_hex(8)
    with bind("127.0.0.1", 0) as sock:
        url = "http://{}:{}".format(*sock.getsockname())
        command = ["-m", "mball.bench.gateway_mball", "--fd", str(sock.fileno()), "--folder", str(folder)]
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, f"--key={key}", pass_fds=[sock.fileno()], stdout=quiet, stderr=quiet
        )
    headers = {"authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with aiohttp.ClientSession(headers=headers, connector=connector) as http, asyncio.timeout(DEADLINE_S):
            served = Served(process, url, http)
            assert (await served.stream(1, 0))[0] == 200
            yield served
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def workers(server: int) -> list[psutil.Process]:
    found = psutil.Process(server).children(recursive=True)
    assert any("gateway_worker" in " ".join(process.cmdline()) for process in found)
    return found


@pytest.mark.parametrize("times", [1, 2])
async def test_each_is_answered_once_and_nothing_is_left(tmp_path_factory: pytest.TempPathFactory, times: int) -> None:
    async with serving(tmp_path_factory.mktemp("s")) as served:
        begun = [asyncio.Event() for _ in range(20)]
        long = [asyncio.create_task(served.stream(2000, 20, event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        short = [asyncio.create_task(served.stream(3, 1)) for _ in range(50)]
        children = workers(served.process.pid)
        for _ in range(times):
            os.kill(served.process.pid, signal.SIGTERM)
            # The second is another one only once the first was seen.
            await asyncio.gather(*short) if times == 1 else await asyncio.sleep(0.2)
        late = await served.stream(1, 0)
        answers = await asyncio.gather(*long, *short)
        await served.process.wait()
        for _, content in answers:
            ends = content.count(b"data: [DONE]\n\n"), content.count(b'"error"'), content.endswith(b"cut")
            assert sum(ends) == 1, content[-300:]
        # The long ones had begun: the last that comes says why there is no more.
        for _, content in answers[: len(long)]:
            assert content.endswith(b"\n\n")
            assert "shuts down" in json.loads(content.rstrip().rpartition(b"data: ")[2])["error"]["message"]
        assert late[0] in (0, 503)
        _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
        assert alive == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=5).close()
