"""`mball batch` killed again and again, and on a disk that fills up, against a gateway over fake workers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mball.server.batch.answers import NotWritten
from mball.server.batch.run import run_batch
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.forking import forking
from tests.server.gateway.conftest import Start, device, gateway, runtime_dir
from tests.small_disk import fill

__all__ = ["device", "gateway", "runtime_dir"]

LINES = 2000
KILLS = 20


def put(path: Path, count: int, models: str, **body: Any) -> None:
    """Models in turn, so that it is the batch that sorts them."""
    with path.open("w") as file:
        for n in range(count):
            ask = {"model": models[n % len(models)], "messages": [], **body}
            line = {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": ask}
            file.write(json.dumps(line) + "\n")


def check(target: Path, count: int, models: str) -> None:
    """All answers are there, no one twice, each its own model's."""
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [custom_id for custom_id, times in Counter(line["custom_id"] for line in answers).items() if times > 1] == []
    assert {line["custom_id"] for line in answers} == {f"r{n}" for n in range(count)}
    for line in answers:
        asked = models[int(line["custom_id"][1:]) % len(models)]
        assert line["response"]["body"]["choices"][0]["message"]["content"].startswith(f"{asked} ")


async def test_killed_twenty_times_the_output_is_complete_and_no_line_is_there_twice(
    gateway: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(1 << 32)
    with capsys.disabled():
        sys.stdout.write(f"\nseed {seed}\n")
    chance = random.Random(seed)
    running = await gateway(model("a"), model("b"))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    put(source, LINES, "ab")
    arguments = ["batch", "-i", str(source), "-o", str(target), "--url", running.url]

    def written() -> int:
        return target.stat().st_size if target.exists() else 0

    async with asyncio.timeout(300), forking("tests.server.batch.forks", log=tmp_path / "log") as forks:
        for _ in range(KILLS):
            pid = await forks.begin(json.dumps(arguments))
            # Of some 700 bytes a line: all the kills fit into what is to be written.
            enough = written() + chance.randrange(LINES * 500 // KILLS)
            await running.until(lambda enough=enough: written() > enough)  # type: ignore[misc]
            await asyncio.sleep(chance.random() * 0.01)
            await forks.kill(pid)
        await forks.begin(json.dumps(arguments))
        assert await forks.code() == 0, (tmp_path / "log").read_text()
    check(target, LINES, "ab")
    assert not target.with_name("out.jsonl.errors").exists()
    # Each model was brought in once, whatever was killed.
    assert [running.state(name)["promotions"] for name in "ab"] == [1, 1]


async def test_a_full_disk_is_told_and_nothing_that_was_answered_is_asked_again(
    gateway: Start, tmp_path: Path, small_disk: Path
) -> None:
    running = await gateway(model("a", Knobs(tokens=1000)), model("b", Knobs(tokens=1000)))
    source, target, errors = tmp_path / "in.jsonl", small_disk / "out.jsonl", tmp_path / "errors"
    put(source, 60, "ab")
    fill(small_disk)
    others = small_disk / "others"
    os.truncate(others, others.stat().st_size - 64 * 1024)
    with pytest.raises(NotWritten, match=r"out\.jsonl: No space left on device; make room"):
        await run_batch(source, target, running.url, errors=errors)
    kept = target.read_bytes()
    assert 0 < kept.count(b"\n") < 60
    assert kept.endswith(b"}\n")
    with pytest.raises(NotWritten):
        await run_batch(source, target, running.url, errors=errors)
    others.unlink()
    tally = await run_batch(source, target, running.url, errors=errors)
    assert tally.skipped >= kept.count(b"\n")
    assert target.read_bytes().startswith(kept)
    check(target, 60, "ab")
    assert not errors.exists()
