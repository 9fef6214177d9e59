"""KV of real models in the swap store: there again after a restart and after a kill, and never another's bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from mball.server.gateway.access import new_key
from tests.e2e.conftest import Serve
from tests.e2e.kv_server import BLOCK, A, B, ask, models, settings, state, store


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


def test_keys_share_no_kv(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    """How soon an answer comes tells one nothing of what another asked."""
    keys = [new_key() for _ in range(2)]
    entries = [{"name": f"key {number}", "sha256": sha256} for number, (_, sha256) in enumerate(keys)]
    with serve(models(models_dir, A), **settings(tmp_path, api_keys=entries)) as server:
        (first, _), (second, _) = keys
        cold, cached = ask(server, key=first)
        assert cached == 0
        assert ask(server, key=second) == (cold, 0)
        assert ask(server, key=second, cache_salt="of its own") == (cold, 0)
        assert ask(server, key=first)[1] > 800


def _flip(path: Path, slots_bytes: int) -> None:
    """A bit in each 64 KiB of the slots, which stand last."""
    with path.open("r+b") as file:
        for at in range(path.stat().st_size - slots_bytes, path.stat().st_size, 64 << 10):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 16]))
