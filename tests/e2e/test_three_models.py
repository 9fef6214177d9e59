"""Three chat models, room for one: every request is answered, the budget holds, nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from mball.memory import control
from mball.memory.spec import WorkerSpec
from mball.server.client import Client
from mball.units import MiB, format_bytes
from tests.e2e import smaps
from tests.e2e.conftest import CHAT_MODELS, Serve

REQUESTS = 300
PROMOTIONS = 60
IN_FLIGHT = 5
BUDGET_BYTES = 700 * MiB
"""Room for the largest of the three beside what sleeping workers hold, and for no two of them."""
KV_BYTES = {name: (48 if name.endswith("fp32") else 96) * MiB for name in CHAT_MODELS}
QUESTIONS = ("Name a colour.", "What is 2 + 2?", "Say hello in French.", "Name an animal that swims.")


async def ask(client: openai.AsyncOpenAI, model: str, question: str, **options: Any) -> str:
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=6, **options
    )
    assert answer.model == model
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1
    return str(answer.choices[0].message.content)


async def ask_interleaved(url: str, models: tuple[str, ...], count: int) -> list[tuple[str, str, str]]:
    """(model, question, answer) of `count` requests, the models in turn, IN_FLIGHT at a time."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def one(number: int) -> tuple[str, str, str]:
            model, question = models[number % len(models)], QUESTIONS[number // len(models) % len(QUESTIONS)]
            async with slots:
                return model, question, await ask(client, model, question)

        return await asyncio.gather(*(one(number) for number in range(count)))


def idle_bytes(folder: Path, sockets: Path) -> dict[str, int]:
    """Anonymous bytes of workers that have started and never held weights, read from outside."""
    with ExitStack() as stack:
        idle = {name: stack.enter_context(idle_worker(name, folder / name, sockets)) for name in CHAT_MODELS}
        return {name: smaps.private_bytes(pid) or 0 for name, pid in idle.items()}


@contextmanager
def idle_worker(model: str, path: Path, sockets: Path) -> Iterator[int]:
    """Its pid, from its hello on."""
    ours, theirs = control.pair()
    spec = WorkerSpec(model=model, path=str(path), socket_path=str(sockets / f"{model}.sock"), device="cpu")
    command = [sys.executable, "-m", "mball.server.worker", "--control-fd", str(theirs.fileno())]
    process = subprocess.Popen([*command, "--spec", spec.to_json()], pass_fds=[theirs.fileno()])
    theirs.close()
    ours.settimeout(300)
    try:
        assert json.loads(ours.recv(control.MESSAGE_BYTES))["event"] == "hello"
        yield process.pid
    finally:
        ours.close()
        process.wait(timeout=60)


@contextmanager
def sampled(server: int, baselines: dict[str, int], file: Path) -> Iterator[None]:
    with file.open("wb") as output:
        command = [sys.executable, smaps.__file__, str(server), json.dumps(baselines)]
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)
        try:
            yield
        finally:
            sampler.communicate(timeout=60)
    assert sampler.returncode == 0


@pytest.mark.timeout(1500)
def test_300_requests_over_three_models_with_room_for_one(models_dir: Path, tmp_path: Path, serve: Serve) -> None:
    baselines = idle_bytes(models_dir, tmp_path)
    samples = tmp_path / "samples.jsonl"
    models = [{"path": str(models_dir / name), "kv_cache_memory_bytes": KV_BYTES[name]} for name in CHAT_MODELS]
    with serve(models, device_memory_bytes=BUDGET_BYTES, max_wait_s=0.0) as server:
        with sampled(server.pid, baselines, samples):
            answers = asyncio.run(ask_interleaved(server.url, CHAT_MODELS, REQUESTS))
        with Client(server.url) as client:
            state = client.state()
        workers = smaps.workers(server.pid)

    assert len(answers) == REQUESTS
    assert all(answer for _, _, answer in answers)
    assert sum(model["promotions"] for model in state["models"]) >= PROMOTIONS
    assert len(workers) == len(CHAT_MODELS)
    assert not [pid for pid in (server.pid, *workers) if psutil.pid_exists(pid)]

    sums = [sum(max(0, held) for held in json.loads(line).values()) for line in samples.read_text().splitlines()]
    assert len(sums) > PROMOTIONS, "too few samples to have seen every stay on the device"
    assert max(sums) > 500 * MiB, "the sampler did not see the largest model on the device"
    assert max(sums) <= BUDGET_BYTES, f"{format_bytes(max(sums))} held of {format_bytes(BUDGET_BYTES)}"


@pytest.mark.timeout(1500)
def test_the_same_tokens_as_each_model_alone(models_dir: Path, serve: Serve) -> None:
    # A prompt whose beginning is there already is computed in other pieces, and rounds otherwise.
    same = {"max_num_seqs": 1, "enable_prefix_caching": False}
    models = [{"path": str(models_dir / name), "kv_cache_memory_bytes": KV_BYTES[name], **same} for name in CHAT_MODELS]
    alone: dict[tuple[str, str], str] = {}
    for name, model in zip(CHAT_MODELS, models, strict=True):
        with serve([model]) as server:
            for _, question, answer in asyncio.run(ask_interleaved(server.url, (name,), len(QUESTIONS))):
                alone[name, question] = answer
    assert len(set(alone.values())) > len(QUESTIONS), "the models answer alike: the comparison would show nothing"

    with serve(models, device_memory_bytes=BUDGET_BYTES, max_wait_s=0.0) as server:
        answers = asyncio.run(ask_interleaved(server.url, CHAT_MODELS, REQUESTS))
        with Client(server.url) as client:
            promotions = sum(model["promotions"] for model in client.state()["models"])

    assert promotions >= PROMOTIONS
    assert len(answers) == REQUESTS
    wrong = [(model, question, answer) for model, question, answer in answers if alone[model, question] != answer]
    assert not wrong


def test_nothing_is_left_when_the_server_is_killed(models_dir: Path, serve: Serve) -> None:
    with serve([str(models_dir / CHAT_MODELS[0])]) as server:
        with Client(server.url) as client:
            client.move(CHAT_MODELS[0], "load")
        workers = [psutil.Process(pid) for pid in smaps.workers(server.pid)]
        assert workers
        os.kill(server.pid, 9)
        gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert len(gone) == len(workers)
