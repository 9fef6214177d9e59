"""vLLM beside the embedded engine, behind the gateway, on a device that has room for one of the two models."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import yaml
from rich.console import Console

from mball.device import proc
from mball.server.cli.operate import table
from mball.server.client import Client
from mball.server.run import Running, running_server
from mball.units import MiB
from tests.demo_models import demo_model
from tests.vllm_python import vllm_python

BUDGET_BYTES = 700 * MiB
WEIGHTS_BYTES = 256 * MiB
PROMPT = "The capital of France is"
LONG_PROMPT = " ".join(f"On day {day} the river rose by {day * 7 % 13} inches." for day in range(1, 30))
LONG_BLOCKS = 2
"""That it fills."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("vllm")
    models = [
        {
            "path": str(demo_model("smollm2-135m")),
            "engine": "vllm",
            "engine_python": str(vllm_python()),
            "engine_args": {"enforce-eager": True},
            "max_model_len": 1024,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": "96MiB",
            "kv_arena_bytes": "32MiB",
        },
        {"path": str(demo_model("smollm2-135m-27l")), "kv_cache_memory_bytes": "64MiB"},
    ]
    config = folder / "mball.yaml"
    swap = {"path": str(folder / "swap"), "size_bytes": "64MiB", "slot_bytes": "512KiB"}
    settings = {"device_memory_bytes": BUDGET_BYTES, "max_wait_s": 0, "start_timeout_s": 400, "swap": swap}
    config.write_text(yaml.safe_dump({"models": models, "log_dir": str(folder / "logs"), **settings}))
    with running_server(["--config", str(config)], log=folder / "server.log") as running:
        yield running


def complete(server: Running, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=500)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def complete_long(server: Running) -> tuple[str, int]:
    """And how many tokens of the prompt were not computed."""
    body = {"model": "smollm2-135m", "prompt": LONG_PROMPT, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=500)
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"].get("prompt_tokens_details") or {}
    return str(answer.json()["choices"][0]["text"]), int(details.get("cached_tokens") or 0)


def kept(server: Running) -> None:
    """Waits until its blocks are in the store."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with Client(server.url) as client:
            swap = client.state()["swap"]
        if swap["blocks"] >= LONG_BLOCKS:
            return
        time.sleep(0.1)
    raise AssertionError(swap)


def state(server: Running, model: str = "smollm2-135m") -> dict[str, Any]:
    with Client(server.url) as client:
        found = client.model(model)
    assert not found["error"], found["error"]
    return found


def test_two_engines_take_turns_and_vllm_wakes_token_exact(server: Running) -> None:
    first, other = complete(server, "smollm2-135m"), complete(server, "smollm2-135m-27l")
    assert "Paris" in first
    for _ in range(3):
        before = state(server)
        assert before["shown_as"] == "dram"
        assert before["device_bytes"] < 64 * MiB
        asleep_bytes = proc.family_private_bytes(before["pid"])
        assert complete(server, "smollm2-135m") == first
        awake = state(server)
        assert awake["shown_as"] == "device"
        assert awake["pid"] == before["pid"]
        assert (proc.family_private_bytes(awake["pid"]) or 0) - (asleep_bytes or 0) > 0.95 * WEIGHTS_BYTES
        assert complete(server, "smollm2-135m-27l") == other
    with Client(server.url) as client:
        whole = client.state()
    assert not whole["books_wrong"]
    assert whole["devices"][0]["promised_bytes"] <= BUDGET_BYTES
    assert whole["dram"]["worker_bytes"] == 32 * MiB, "its rows of KV, which are in no process's private memory"
    shown = StringIO()
    Console(file=shown, width=250).print(table(whole))
    assert "32.0 MiB of workers" in shown.getvalue()


def test_its_own_routes_are_the_managers_alone(server: Running) -> None:
    for path in ("sleep", "wake_up", "collective_rpc", "v1/load_lora_adapter", "reset_prefix_cache"):
        for model in ("", "smollm2-135m/"):
            answer = httpx.post(f"{server.url}/{model}{path}", json={"model": "smollm2-135m"}, timeout=60)
            assert answer.status_code in (404, 405), (path, answer.text)
    assert complete(server, "smollm2-135m")
    socket_folders = [Path(connection.laddr).parent for connection in _sockets(state(server)["pid"])]
    assert socket_folders
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in socket_folders)


def _sockets(pid: int) -> list[Any]:
    found = [psutil.Process(member).net_connections("unix") for member in proc.family(pid)]
    return [connection for each in found for connection in each if str(connection.laddr).endswith(".sock")]


def test_bad_requests_are_answered_by_vllm_in_openais_shape(server: Running) -> None:
    body = {"model": "smollm2-135m", "prompt": PROMPT, "max_tokens": 100_000}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=500)
    assert answer.status_code == 400
    assert "message" in answer.json()["error"]


def test_messages_and_responses_are_vllm_s_own(server: Running) -> None:
    asked: dict[str, Any] = {"model": "smollm2-135m", "temperature": 0}
    messages = {**asked, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    response = {**asked, "input": "Say hello.", "max_output_tokens": 8, "store": False}

    def post(path: str, body: dict[str, Any]) -> httpx.Response:
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=500)
        assert answer.status_code == 200, answer.text
        return answer

    def events(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        lines = post(path, {**body, "stream": True}).text.splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]

    before = _generated(server)
    whole = post("/v1/messages", messages).json()
    assert (whole["type"], whole["role"]) == ("message", "assistant")
    assert whole["usage"]["output_tokens"] == 8
    counted = {name: value for name, value in messages.items() if name not in ("max_tokens", "temperature")}
    assert post("/v1/messages/count_tokens", counted).json()["input_tokens"] == whole["usage"]["input_tokens"]
    found = events("/v1/messages", messages)
    assert (found[0]["type"], found[-1]["type"]) == ("message_start", "message_stop")
    deltas = [each["delta"].get("text", "") for each in found if each["type"] == "content_block_delta"]
    assert "".join(deltas) == whole["content"][0]["text"]
    answer = post("/v1/responses", response).json()
    assert answer["object"] == "response"
    text = answer["output"][-1]["content"][0]["text"]
    found = events("/v1/responses", response)
    assert found[-1]["type"] in ("response.completed", "response.incomplete")
    assert "".join(each["delta"] for each in found if each["type"] == "response.output_text.delta") == text
    assert _generated(server) - before == 4 * 8, "the gateway reads the usage of each"


def _generated(server: Running) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    name = 'mball:generation_tokens_total{model_name="smollm2-135m"} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_its_tokens_are_those_that_vllm_says(server: Running) -> None:
    answer = httpx.post(f"{server.url}/tokenize", json={"model": "smollm2-135m", "prompt": PROMPT}, timeout=500)
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["tokens"]
    back = httpx.post(f"{server.url}/detokenize", json={"model": "smollm2-135m", "tokens": tokens}, timeout=500)
    assert back.json() == {"prompt": PROMPT}


def test_a_killed_worker_is_started_again_and_its_kv_is_there(server: Running) -> None:
    first, (text, _) = complete(server, "smollm2-135m"), complete_long(server)
    kept(server)
    before = state(server)
    family = [psutil.Process(pid) for pid in proc.family(before["pid"])]
    assert len(family) > 2
    # Not the one that the manager started, but the one that computes.
    os.kill(family[-1].pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert len(gone) == len(family)
    assert complete(server, "smollm2-135m") == first
    assert complete_long(server) == (text, LONG_BLOCKS * 128)
    after = state(server)
    assert after["pid"] != before["pid"]
    assert after["starts"] == before["starts"] + 1
