"""LoRA adapters as models: real vLLM on the CPU, with adapters that the test writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mball.server.client import Client
from mball.server.models import random
from mball.server.run import Running, running_server
from mball.units import MiB
from tests.vllm_python import vllm_python

RANK = 8
PROMPT = [5, 6, 7, 8, 9]


def adapter(folder: Path, base: Path, seed: int) -> Path:
    """Of random weights, for every layer's query projection."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    wide = config["hidden_size"]
    queries = config["num_attention_heads"] * config.get("head_dim", wide // config["num_attention_heads"])
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**said, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}))
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, wide, generator=drawn)
        tensors[f"{name}.lora_B.weight"] = torch.randn(queries, RANK, generator=drawn)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    python = vllm_python()
    base = folder / "tiny"
    random.make("llama", base, size_bytes=64 * MiB, seed=3)
    modules = [f"{name}={adapter(folder / name, base, seed)}" for seed, name in enumerate(("formal", "brief"))]
    lora = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2, "lora_modules": modules}
    model = {
        "path": str(base),
        "engine": "vllm",
        "engine_python": str(python),
        "engine_args": {"enforce-eager": True, **lora},
        "engine_env": {"VLLM_LOGGING_PREFIX": "as told "},
        "max_num_seqs": 4,
        # Of the model's own context a part.
        "kv_cache_memory_bytes": "16MiB",
    }
    config = folder / "mball.yaml"
    settings = {"device_memory_bytes": 900 * MiB, "start_timeout_s": 400, "zygote": False}
    config.write_text(yaml.safe_dump({"models": [model], "log_dir": str(folder / "logs"), **settings}))
    with running_server(["--config", str(config)], log=folder / "server.log") as running:
        yield running


def ask(server: Running, model: str) -> tuple[str, list[float]]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=500)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    assert said["model"] == model
    return said["choices"][0]["text"], said["choices"][0]["logprobs"]["token_logprobs"]


def test_adapters_are_models_that_sleep_and_wake_with_their_base(server: Running, folder: Path) -> None:
    listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    assert {model["id"]: model.get("parent") for model in listed} == {"tiny": None, "formal": "tiny", "brief": "tiny"}
    # The first to be asked for is an adapter: its base comes in for it.
    brief, base, formal = ask(server, "brief"), ask(server, "tiny"), ask(server, "formal")
    assert base[1] != brief[1]
    assert base[1] != formal[1]
    assert brief[1] != formal[1]
    with Client(server.url) as client:
        pid = client.model("tiny")["pid"]
        client.move("tiny", "unload")
        assert client.model("tiny")["shown_as"] != "device"
    # What an adapter is made of is in none of the model's files: it was not read again, and is what it was.
    assert ask(server, "formal") == formal
    assert ask(server, "tiny") == base
    assert ask(server, "brief") == brief
    with Client(server.url) as client:
        assert client.model("tiny")["pid"] == pid
    long = {"model": "tiny", "prompt": [5] * 8000, "max_tokens": 1}
    refused = httpx.post(f"{server.url}/v1/completions", json=long, timeout=500)
    assert refused.status_code == 400
    assert "maximum context length" in refused.json()["error"]["message"]
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "curt", "prompt": "x"}, timeout=60)
    assert answer.status_code == 404
    # Read while vLLM is imported, in its server and in its engine.
    log = (folder / "logs" / "tiny.log").read_text()
    assert {"APIServer", "EngineCore"} <= set(re.findall(r"^as told \((\w+) pid=", log, re.MULTILINE))
