"""In a cgroup that has less memory than a model has weights, and in one that others fill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from mball.server.models import random
from mball.units import MiB
from tests.cgroup import Cgroup, cgroup
from tests.e2e.conftest import Serve

HOG = """
import sys, time
quickly, slowly = (int(word) for word in sys.argv[1:])
held = [bytes([85]) * (1 << 20) for _ in range(quickly)]
for _ in range(slowly // 8):
    held.append(bytes([85]) * (8 << 20))
    time.sleep(0.25)
print("full", flush=True)
sys.stdin.read()
"""
"""MiB at once, and MiB at a rate that leaves many seconds to one who looks every two."""


@pytest.fixture
def limited() -> Iterator[Cgroup]:
    with cgroup() as made:
        yield made


def test_a_model_larger_than_the_memory_there_is_answers_from_the_disk(
    serve: Serve, limited: Cgroup, tmp_path: Path
) -> None:
    random.make("llama", tmp_path / "large", size_bytes=1400 * MiB, seed=3, max_shard_bytes=400 * MiB)
    large = {"name": "large", "path": str(tmp_path / "large"), "kv_cache_memory_bytes": "32MiB", "max_num_seqs": 1}
    large["resident_layers"] = "auto"
    with serve([large], device_memory_bytes="3GiB", dram_bytes="0") as server:
        expected = ask(server.url, "large")
    limited.limit(1200 * MiB)
    with limited.entered():
        running = serve([large], device_memory_bytes="600MiB", dram_bytes="0")
        server = running.__enter__()
    try:
        assert ask(server.url, "large") == expected
        assert state(server.url, "large")["crashes"] == 0
        assert limited.kills() == 0
        assert limited.used_bytes() <= 1200 * MiB
    finally:
        running.__exit__(None, None, None)


def test_images_give_way_to_neighbours_that_fill_the_memory(serve: Serve, limited: Cgroup, models_dir: Path) -> None:
    names = ("smollm2-135m", "smollm2-135m-27l")
    models = [{"name": name, "path": str(models_dir / name), "kv_cache_memory_bytes": "32MiB"} for name in names]
    limited.limit(3000 * MiB)
    with limited.entered():
        running = serve(models, device_memory_bytes="420MiB", dram_bytes="2GiB", host_reserve_bytes="300MiB")
        server = running.__enter__()
    hog = None
    try:
        expected = {name: ask(server.url, name) for name in names}
        for name in names * 2:
            assert ask(server.url, name) == expected[name]
        assert any(state(server.url, name)["image_ready"] for name in names)
        room = 3000 * MiB - unreclaimable(limited)
        with limited.entered():
            hog = subprocess.Popen(
                [sys.executable, "-c", HOG, str(room // MiB - 450), "600"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert hog.stdout is not None
        assert hog.stdout.readline() == "full\n"
        for name in names * 2:
            assert ask(server.url, name) == expected[name]
        assert limited.kills() == 0
        assert "pressure" in {event["kind"] for event in state(server.url)["events"]}
    finally:
        if hog is not None:
            hog.communicate()
        running.__exit__(None, None, None)


def unreclaimable(limited: Cgroup) -> int:
    """Without the page cache of files."""
    found = dict(line.split() for line in (limited.folder / "memory.stat").read_text().splitlines())
    return sum(int(found.get(name, 0)) for name in ("rss", "shmem", "anon"))


def ask(url: str, model: str) -> Any:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def state(url: str, model: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(httpx.get(f"{url}/mball/v1/state", timeout=60).text)
    return found if model is None else next(each for each in found["models"] if each["name"] == model)
