"""A server that is killed while it answers a batch: the next one goes on with it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from mball.server.run import bind
from tests.memory.conftest import runtime_dir
from tests.server.gateway.conftest import Gateway
from tests.server.gateway.test_batches import create, each_once, line, until

__all__ = ["runtime_dir"]

LINES = 600
KILLS = 6


async def test_killed_at_random_no_line_is_lost_or_there_twice(
    tmp_path: Path, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(1 << 32)
    with capsys.disabled():
        sys.stdout.write(f"\nseed {seed}\n")
    chance = random.Random(seed)
    with bind("127.0.0.1", 0) as sock, (tmp_path / "log").open("wb") as log:
        descriptor = sock.fileno()
        forks = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.server.gateway.forks", str(descriptor), tmp_path / "files", runtime_dir),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            pass_fds=[descriptor],
        )
        told, said = forks.stdin, forks.stdout
        assert told is not None
        assert said is not None

        async def begin(number: int) -> int:
            assert told is not None
            assert said is not None
            told.write(f"{number}\n".encode())
            return int(await said.readline())

        async with asyncio.timeout(300), aiohttp.ClientSession() as http:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            running = Gateway(None, url, http, None)  # type: ignore[arg-type]
            pid = await begin(0)
            batch = await create(running, [line(n, "ab"[n % 2]) for n in range(LINES)])
            for number in range(1, KILLS + 1):
                until_then = batch["request_counts"]["completed"] + chance.randrange(LINES // KILLS)
                batch = await until(
                    running, batch, lambda batch, n=until_then: batch["request_counts"]["completed"] >= n
                )  # type: ignore[misc]
                await asyncio.sleep(chance.random() * 0.01)
                os.kill(pid, signal.SIGKILL)
                assert int(await said.readline()) == -signal.SIGKILL
                pid = await begin(number)
            batch = await until(running, batch)
            assert batch["status"] == "completed"
            assert await each_once(running, batch, LINES) == (LINES, 0)
            os.kill(pid, signal.SIGTERM)
            await said.readline()
            told.close()
            await forks.wait()
