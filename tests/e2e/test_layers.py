"""A model larger than what the device may hold answers, also while its balloon takes layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai

from mball.units import MiB
from tests.e2e.conftest import Serve

LARGE = {"name": "large", "kv_cache_memory_bytes": "40MiB", "max_num_seqs": 1}


def test_a_model_larger_than_its_device(serve: Serve, models_dir: Path) -> None:
    path = str(models_dir / "smollm2-135m")
    with serve([{**LARGE, "path": path}], device_memory_bytes="1GiB") as server:
        expected = _text(server.url)
    with serve([{**LARGE, "path": path, "resident_layers": "auto"}], device_memory_bytes="240MiB") as server:
        assert _text(server.url) == expected
        before = _state(server.url)
        assert before["device_bytes"] < 240 * MiB
        _balloon(server.url, "60MiB")
        assert _text(server.url) == expected
        after = _state(server.url)
        assert after["ballooned_bytes"] >= 60 * MiB
        assert before["device_bytes"] - after["device_bytes"] > 40 * MiB
        _balloon(server.url, "0")
        assert _text(server.url) == expected
        assert _state(server.url)["ballooned_bytes"] == 0


def test_one_that_nobody_said_may_be_streamed_is_rather_than_refused_and_gives_way_to_what_is_pinned(
    serve: Serve, models_dir: Path, tmp_path: Path
) -> None:
    large = {**LARGE, "path": str(models_dir / "smollm2-135m"), "kv_cache_memory_bytes": "20MiB"}
    small = {"name": "small", "path": str(models_dir / "all-minilm-l6-v2"), "pinned": True, "preload": True}
    device = {"device": [f"simulated:{tmp_path / 'gpu'}"]}
    with serve([large], device_memory_bytes="1GiB") as server:
        expected = _text(server.url)
    with serve([large], device_memory_bytes="240MiB", **device) as server:
        assert _text(server.url) == expected
        alone = _state(server.url)
        assert 100 * MiB < alone["device_bytes"] < 240 * MiB
    with serve([large, small], device_memory_bytes="240MiB", **device) as server:
        _embed(server.url)
        assert _text(server.url) == expected
        state = _state(server.url)
        assert state["ballooned_bytes"] > 0
        assert state["promised_bytes"] == alone["promised_bytes"] - state["ballooned_bytes"]
        assert _state(server.url, "small")["demotions"] == 0
        _embed(server.url)


def _embed(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        client.embeddings.create(model="small", input="x")


def _text(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        answer = client.completions.create(
            model="large", prompt="The capital of France is", max_tokens=12, temperature=0
        )
    return answer.choices[0].text


def _balloon(url: str, size: str) -> None:
    subprocess.run([sys.executable, "-m", "mball", "balloon", "large", size, "--url", url], check=True, timeout=120)


def _state(url: str, name: str = "large") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mball", "ps", "--json", "--url", url], check=True, timeout=120, capture_output=True
    )
    return next(dict(model) for model in json.loads(done.stdout)["models"] if model["name"] == name)
