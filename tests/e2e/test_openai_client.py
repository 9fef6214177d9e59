"""The openai package against a running server: sync, async, streaming, leaving in the middle."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest

from mball.server.client import Client
from mball.server.run import Running, running_server
from tests.e2e.conftest import CHAT_MODELS, EMBEDDING_MODEL

MODEL = CHAT_MODELS[0]
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folders = [str(models_dir / name) for name in (MODEL, EMBEDDING_MODEL)]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server([*folders, "--device-memory", "2GiB"], log=log) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
    pieces, usage = [], None
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 2
    assert usage == whole.usage


async def test_async_clients_share_a_batch(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def one(seed: int) -> str:
            answer = await client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=16, temperature=1.0, seed=seed
            )
            return str(answer.choices[0].message.content)

        answers = await asyncio.gather(*(one(seed) for seed in (1, 2, 3, 4)))
    assert len(set(answers)) > 1


def test_responses_messages_and_json_of_a_schema(server: Running, client: openai.OpenAI) -> None:
    """One model by three APIs, through the gateway, which counts what each took."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    kept = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=form, max_tokens=40)
    assert json.loads(kept.choices[0].message.content or "") in ({"n": 1}, {"n": 2})
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=4)
    assert answer.output_text
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=300) as claude:
        before = _generated(server)
        with claude.messages.stream(model=MODEL, messages=HELLO, max_tokens=4) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "max_tokens"
        assert claude.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 2
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(model="other", messages=HELLO, max_tokens=1)
    deadline = time.monotonic() + 30
    while _generated(server) < before + 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _generated(server: Running) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf'mball:generation_tokens_total{{model_name="{MODEL}"}} ([0-9.]+)', text)
    return 0.0 if found is None else float(found[1])


def test_completions_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="One two three", max_tokens=4, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 4
    assert "".join(logprobs.tokens) == answer.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["a cat", "a kitten", "the stock market"]
    vectors = [item.embedding for item in client.embeddings.create(model=EMBEDDING_MODEL, input=texts).data]

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(vectors[0], vectors[0]) == pytest.approx(1, abs=1e-3)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.2


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, EMBEDDING_MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-5")


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_in_the_middle_frees_the_slot_within_a_second(server: Running, stream: bool) -> None:
    # The best of three: a machine that stalls for a moment says nothing about the server.
    assert min([await _seconds_until_free(server, stream) for _ in range(3)]) < 1.0


async def _seconds_until_free(server: Running, stream: bool) -> float:
    with Client(server.url) as state:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asking = asyncio.create_task(
                client.chat.completions.create(
                    model=MODEL,
                    messages=HELLO,
                    max_tokens=1500,
                    temperature=1.0,
                    seed=7,
                    stream=stream,
                    extra_body={"min_tokens": 1500},
                )
            )
            if stream:
                answer = await asking
                async for chunk in answer:
                    if chunk.choices[0].delta.content:
                        break
            await _until(state, 1, deadline_s=60)
            left = time.monotonic()
            if stream:
                await answer.close()
            else:
                asking.cancel()
            await _until(state, 0, deadline_s=30)
            return time.monotonic() - left


async def _until(state: Client, in_flight: int, *, deadline_s: float) -> None:
    async with asyncio.timeout(deadline_s):
        while True:
            model = await asyncio.to_thread(state.model, MODEL)
            if model["in_flight"] == in_flight == model["engine"]["running"]:
                return
            await asyncio.sleep(0.02)
