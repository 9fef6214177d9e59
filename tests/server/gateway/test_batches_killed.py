"""A server that is killed while it answers a batch: the next one goes on with it."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import aiohttp
import pytest

from mball.server.run import bind
from tests.memory.conftest import runtime_dir
from tests.server.forking import forking
from tests.server.gateway.conftest import Gateway
from tests.server.gateway.test_batches import create, each_once, line, until

__all__ = ["runtime_dir"]

LINES = 600
KILLS = 6
STOPS = (2, 5)
"""Of these the ones that are told to end, in the middle too."""


async def test_killed_or_stopped_at_random_no_line_is_lost_or_there_twice(
    tmp_path: Path, runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(1 << 32)
    with capsys.disabled():
        sys.stdout.write(f"\nseed {seed}\n")
    chance = random.Random(seed)
    with bind("127.0.0.1", 0) as sock:
        arguments = (sock.fileno(), tmp_path / "files", runtime_dir)
        async with (
            asyncio.timeout(300),
            forking(
                "tests.server.gateway.forks", *arguments, log=tmp_path / "log", descriptors=(sock.fileno(),)
            ) as forks,
            aiohttp.ClientSession() as http,
        ):
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            running = Gateway(None, url, http, None)  # type: ignore[arg-type]
            pid = await forks.begin("0")
            batch = await create(running, [line(n, "ab"[n % 2]) for n in range(LINES)])
            for number in range(1, KILLS + 1):
                enough = batch["request_counts"]["completed"] + chance.randrange(LINES // KILLS)
                batch = await until(
                    running, batch, lambda batch, enough=enough: batch["request_counts"]["completed"] >= enough
                )  # type: ignore[misc]
                await asyncio.sleep(chance.random() * 0.01)
                await (forks.stop if number in STOPS else forks.kill)(pid)
                pid = await forks.begin(str(number))
            batch = await until(running, batch)
            assert batch["status"] == "completed"
            assert await each_once(running, batch, LINES) == (LINES, 0)
