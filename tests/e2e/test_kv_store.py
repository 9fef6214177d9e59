"""KV of real models in the swap store: there again after a restart and after a kill, and never another's bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai

from mball.server.run import Running
from tests.e2e.conftest import Serve

A, B = "smollm2-135m", "smollm2-135m-27l"
PROMPT = " ".join(f"Station {n} lies {n * 7 % 100} miles to the north of the one before it." for n in range(60))
BLOCK = 16


def models(folder: Path, *names: str) -> list[dict[str, Any]]:
    options = {"kv_cache_memory_bytes": "80MiB", "kv_arena_bytes": "80MiB", "max_num_seqs": 1}
    return [{**options, "path": str(folder / name)} for name in names]


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    swap = {"path": str(folder / "swap"), "size_bytes": "256MiB"}
    return {"device_memory_bytes": "1GiB", "state_dir": str(folder / "state"), "swap": swap, **others}


def ask(server: Running, model: str = A, **extra: Any) -> tuple[str, int]:
    """Its answer, and how many of the prompt's tokens were not computed for it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens > 800
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0


def state(server: Running, model: str = A) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/mball/v1/models/{model}", timeout=60).raise_for_status().json())


def store(server: Running) -> dict[str, Any]:
    """Once it is open: it opens beside everything else."""
    while True:
        swap = dict(httpx.get(f"{server.url}/mball/v1/state", timeout=60).json()["swap"])
        if swap["state"] != "opening":
            return swap


def test_a_prompt_asked_twice_is_there_after_a_restart(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    with serve(models(models_dir, A), **settings(tmp_path)) as server:
        cold, cached = ask(server)
        assert cached == 0
        warm, cached = ask(server)
        assert cached > 800
        assert store(server)["blocks"] == 0
    with serve(models(models_dir, A), **settings(tmp_path)) as server:
        assert store(server)["blocks"] > 800 // BLOCK
        text, restored = ask(server, cache_salt="another tenant")
        assert (text, restored) == (cold, 0)
        text, restored = ask(server)
        assert (text, restored) == (warm, cached)
        engine = state(server)["engine"]
        assert engine["kv_restored_tokens"] == cached
        assert engine["kv_failures"] == 0
        slots_bytes = store(server)["total_bytes"]
    _flip(tmp_path / "swap", slots_bytes)
    with serve(models(models_dir, A), **settings(tmp_path)) as server:
        text, restored = ask(server)
        assert (text, restored) == (cold, 0)
        assert state(server)["engine"]["kv_failures"] >= 1
        assert store(server)["counters"]["misses:checksum"] >= 1


def test_kv_of_a_worker_that_is_killed(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    with serve(models(models_dir, A, B), **settings(tmp_path, device_memory_bytes="600MiB")) as server:
        ask(server)
        warm, cached = ask(server)
        # The other one needs the room: what is in the pool goes to the arena, and soon to the store.
        ask(server, B)
        killed = state(server)["pid"]
        while store(server)["blocks"] < cached // BLOCK:
            ask(server, B)
        os.kill(killed, signal.SIGKILL)
        text, restored = ask(server)
        assert state(server)["pid"] != killed
        assert (text, restored) == (warm, cached)


def _flip(path: Path, slots_bytes: int) -> None:
    """A bit in each 64 KiB of the slots, which stand last."""
    with path.open("r+b") as file:
        for at in range(path.stat().st_size - slots_bytes, path.stat().st_size, 64 << 10):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 16]))
