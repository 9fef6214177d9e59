"""Real models whose images leave DRAM for a swap store, and come back from there with the same text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai

from mball.server.run import Running
from tests.e2e.conftest import Serve

A, B = "smollm2-135m", "smollm2-135m-27l"
EMBEDDER = "all-minilm-l6-v2"
OPTIONS = {"kv_cache_memory_bytes": "40MiB", "max_num_seqs": 1}


def settings(folder: Path, **swap: Any) -> dict[str, Any]:
    """Room on the device for one chat model, and in DRAM for one image."""
    return {
        "device_memory_bytes": "500MiB",
        "dram_bytes": "280MiB",
        "state_dir": str(folder / "state"),
        "swap": {"path": str(folder / "swap"), "size_bytes": "700MiB", "weights": "always", **swap},
    }


def models(folder: Path) -> list[dict[str, Any]]:
    return [{**OPTIONS, "path": str(folder / name)} for name in (A, B)]


def text(server: Running, model: str) -> str:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0)
    return answer.choices[0].text


def state(server: Running) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/mball/v1/state", timeout=60).json())


def rung(server: Running, model: str) -> str:
    return str(next(m["shown_as"] for m in state(server)["models"] if m["name"] == model))


def events(server: Running, kind: str, model: str | None = None) -> list[dict[str, Any]]:
    """Of the last twenty."""
    return [e for e in state(server)["events"] if e["kind"] == kind and model in (None, e["model"])]


def take_turns(server: Running, expected: dict[str, str]) -> None:
    """Until the first model's image has left DRAM for the store."""
    for _ in range(12):
        for model in (A, B, B, B, B, B):
            assert text(server, model) == expected[model]
            if rung(server, A) == "nvme":
                return
    raise AssertionError(f"never on the disk: {state(server)}")


def test_weights_go_to_the_store_once_and_come_back(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    with serve(models(models_dir), device_memory_bytes="1GiB", dram_bytes=0) as server:
        expected = {name: text(server, name) for name in (A, B)}
    with serve(models(models_dir), **settings(tmp_path)) as server:
        take_turns(server, expected)
        assert text(server, A) == expected[A]
        [*_, promoted] = events(server, "promoted", A)
        assert promoted["weights_from"] in ("nvme", "dram")
        assert not events(server, "image missed")
        shown = subprocess.run(
            [sys.executable, "-m", "mball", "ps", "--url", server.url], check=True, capture_output=True, text=True
        )
        assert "swap: " in shown.stdout
        assert "images" in shown.stdout
        first = state(server)["swap"]
        assert first["images"] >= 1
        # No way to say goodbye: what is committed is there for the next all the same.
        os.kill(server.pid, signal.SIGKILL)
    with serve(models(models_dir), **settings(tmp_path)) as server:
        for model in (A, B, A):
            assert text(server, model) == expected[model]
        swap = state(server)["swap"]
        assert swap["images"] == first["images"]
        assert "remade" not in swap["counters"]
        froms = [event["weights_from"] for event in events(server, "promoted")]
        assert "nvme" in froms
        for _ in range(3):
            for model in (A, B, B):
                assert text(server, model) == expected[model]
        assert state(server)["swap"]["counters"].get("writes", 0) <= 2 - first["images"]


def test_a_flipped_byte_in_the_store_changes_no_text(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    with serve(models(models_dir), **settings(tmp_path)) as server:
        expected = {name: text(server, name) for name in (A, B)}
        take_turns(server, expected)
    path = tmp_path / "swap"
    with path.open("r+b") as file:
        for at in range(8 << 20, path.stat().st_size, 8 << 20):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 16]))
    checked = subprocess.run(
        [sys.executable, "-m", "mball", "swap", "check", str(path)], capture_output=True, text=True
    )
    assert checked.returncode == 1, checked.stdout
    with serve(models(models_dir), **settings(tmp_path)) as server:
        for model in (A, B, A):
            assert text(server, model) == expected[model]
        assert state(server)["swap"]["counters"]["misses:checksum"] >= 1
        assert events(server, "image missed")


def test_an_embedding_model_comes_from_the_store(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    several = [*models(models_dir)[:1], {"path": str(models_dir / EMBEDDER)}]

    def embed(server: Running) -> list[float]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return client.embeddings.create(model=EMBEDDER, input="a text").data[0].embedding

    options = settings(tmp_path)
    options["dram_bytes"] = "60MiB"
    with serve(several, **options) as server:
        expected = embed(server)
        for _ in range(100):
            if next(m["image_ready"] for m in state(server)["models"] if m["name"] == EMBEDDER):
                break
            assert embed(server) == expected
        assert state(server)["dram"]["image_bytes"] > 0
    with serve(several, **{**options, "dram_bytes": 0}) as server:
        assert embed(server) == expected


def test_a_second_server_is_refused_the_store_and_serves(serve: Serve, models_dir: Path, tmp_path: Path) -> None:
    embedder = [{"path": str(models_dir / EMBEDDER)}]
    with serve(embedder, **settings(tmp_path)) as first:
        (tmp_path / "second").mkdir()
        config = {"models": embedder, **settings(tmp_path), "state_dir": str(tmp_path / "second")}
        (tmp_path / "second.yaml").write_text(json.dumps(config))
        from mball.server.run import running_server

        with running_server(["--config", str(tmp_path / "second.yaml")], log=tmp_path / "second.log") as second:
            answer = httpx.post(f"{second.url}/v1/embeddings", json={"model": EMBEDDER, "input": "a"}, timeout=300)
            assert answer.status_code == 200
            swap = state(second)["swap"]
            assert swap["state"] == "unavailable"
            assert f"pid {first.pid}" in swap["error"]
            assert state(first)["swap"]["state"] == "open"
