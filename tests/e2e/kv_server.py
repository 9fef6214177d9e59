"""A server whose models keep their KV in a swap store, asked one long prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai

from mball.server.run import Running

A, B = "smollm2-135m", "smollm2-135m-27l"
PROMPT = " ".join(f"Station {n} lies {n * 7 % 100} miles to the north of the one before it." for n in range(60))
BLOCK = 16


def models(folder: Path, *names: str) -> list[dict[str, Any]]:
    options = {"kv_cache_memory_bytes": "80MiB", "kv_arena_bytes": "80MiB", "max_num_seqs": 1}
    return [{**options, "path": str(folder / name)} for name in names]


def settings(folder: Path, **others: Any) -> dict[str, Any]:
    swap = {"path": str(folder / "swap"), "size_bytes": "256MiB"}
    return {"device_memory_bytes": "1GiB", "state_dir": str(folder / "state"), "swap": swap, **others}


def ask(server: Running, model: str = A, key: str = "none", **extra: Any) -> tuple[str, int]:
    """Its answer, and how many of the prompt's tokens were not computed for it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300) as client:
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
