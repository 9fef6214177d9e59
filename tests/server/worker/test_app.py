"""OpenAI's protocol through the openai package, over a unix socket, on an engine that gives prompts back."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mball.server.tenants import HEADER, salted
from mball.server.worker import answers
from mball.server.worker.generation import NotResident
from mball.server.worker.sampling import model_defaults
from mball.server.worker.tokenizer import Tokenizer
from tests.server.worker.conftest import MakeWorker, Worker, until

LIMIT = 2048
HELLO = [{"role": "user", "content": "hello there"}]


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer._backend.encode(text, add_special_tokens=False).ids)


async def events(worker: Worker, path: str, **body: Any) -> list[str]:
    """The data of each server-sent event."""
    async with worker.http.stream("POST", path, json={"model": "echo", "stream": True, **body}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def test_a_whole_chat_answer(worker: Worker, tokenizer: Tokenizer) -> None:
    answer = await worker.openai.chat.completions.create(model="echo", messages=HELLO, temperature=0)
    prompt = tokenizer.encode_chat(HELLO, LIMIT)
    assert answer.choices[0].message.content == tokenizer.decode(prompt)[: len(answer.choices[0].message.content)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    sampling = worker.engine.submitted[0].sampling
    assert sampling.temperature == 0
    assert sampling.max_tokens == worker.engine.max_model_len - len(prompt)
    assert sampling.stop_token_ids == worker.engine.eos_token_ids


async def test_answers_have_openais_types_to_the_letter(worker: Worker) -> None:
    """Validated strictly against the package's own models: no field of another name or type."""
    ask = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 3}
    whole = (await worker.post("/v1/chat/completions", **ask)).text
    assert set(json.loads(whole)) <= set(ChatCompletion.model_fields)
    parsed = ChatCompletion.model_validate_json(whole, strict=True, extra="forbid")
    assert [len(choice.logprobs.content) for choice in parsed.choices] == [3, 3]
    for data in (await events(worker, "/v1/chat/completions", **ask, stream_options={"include_usage": True}))[:-1]:
        ChatCompletionChunk.model_validate_json(data, strict=True, extra="forbid")
    ask = {"prompt": ["one", "two"], "logprobs": 2, "max_tokens": 3}
    whole = (await worker.post("/v1/completions", **ask)).text
    Completion.model_validate_json(whole, strict=True, extra="forbid")


async def test_a_stream(worker: Worker, tokenizer: Tokenizer) -> None:
    worker.engine.script = lambda _: spell(tokenizer, "naïve 日本 👩‍👩‍👧!")
    data = await events(worker, "/v1/chat/completions", messages=HELLO, n=2, stream_options={"include_usage": True})
    assert data[-1] == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(event) for event in data[:-1]]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            assert "\ufffd" not in (choice.delta.content or "")
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "naïve 日本 👩‍👩‍👧!", 1: "naïve 日本 👩‍👩‍👧!"}
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop", "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == len(tokenizer.encode_chat(HELLO, LIMIT))
    whole = await worker.openai.chat.completions.create(model="echo", messages=HELLO, n=2)
    assert whole.usage == chunks[-1].usage
    assert whole.system_fingerprint == chunks[0].system_fingerprint


async def test_a_stream_through_the_client_and_without_usage(worker: Worker) -> None:
    stream = await worker.openai.chat.completions.create(model="echo", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_a_stop_string_across_tokens(worker: Worker, tokenizer: Tokenizer) -> None:
    worker.engine.script = lambda _: spell(tokenizer, "the quick brown fox jumps over")
    for stop in ("ck brown f", ["nothing", "ck brown f"]):
        whole = await worker.openai.chat.completions.create(model="echo", messages=HELLO, stop=stop)
        assert whole.choices[0].message.content == "the qui"
        assert whole.choices[0].finish_reason == "stop"
        stream = await worker.openai.chat.completions.create(model="echo", messages=HELLO, stop=stop, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "the qui"
    assert worker.engine.wait_until_idle(10)
    assert len(worker.engine.aborted) == 4


async def test_stop_strings_wait_for_min_tokens(worker: Worker, tokenizer: Tokenizer) -> None:
    script = spell(tokenizer, "aXbXc")
    worker.engine.script = lambda _: script
    answer = await worker.post("/v1/completions", prompt="x", stop="X", min_tokens=2)
    assert answer.json()["choices"][0]["text"] == "aXb"


async def test_what_is_held_back_comes_at_the_end(worker: Worker, tokenizer: Tokenizer) -> None:
    worker.engine.script = lambda _: spell(tokenizer, "the qui")
    answer = await worker.post("/v1/completions", prompt="x", stop="quick")
    assert answer.json()["choices"][0]["text"] == "the qui"
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    answer = await worker.post("/v1/completions", prompt="x", stop="quick", max_tokens=2)
    assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_completions_of_every_kind_of_prompt(worker: Worker, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello there", LIMIT)
    for prompt, expected in [
        ("hello there", [ids]),
        (["hello there", "a"], [ids, tokenizer.encode("a", LIMIT)]),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
    ]:
        worker.engine.submitted.clear()
        answer = await worker.openai.completions.create(model="echo", prompt=prompt, n=2, max_tokens=3)
        assert [list(request.prompt) for request in worker.engine.submitted] == [p for p in expected for _ in range(2)]
        assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
        assert answer.usage.prompt_tokens == sum(map(len, expected))
        assert answer.usage.prompt_tokens_details.cached_tokens == sum(len(prompt) // 2 for prompt in expected)


async def test_the_default_length_of_a_completion_is_openais(worker: Worker) -> None:
    worker.engine.script = lambda request: [7] * 100
    answer = await worker.openai.completions.create(model="echo", prompt="a")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_chat_logprobs(worker: Worker, tokenizer: Tokenizer) -> None:
    worker.engine.script = lambda _: spell(tokenizer, "é🧿")
    answer = await worker.openai.chat.completions.create(model="echo", messages=HELLO, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "é🧿"
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert content[0].logprob == -0.5
    answer = await worker.openai.chat.completions.create(model="echo", messages=HELLO, logprobs=True)
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)


async def test_completion_logprobs(worker: Worker, tokenizer: Tokenizer) -> None:
    worker.engine.script = lambda _: spell(tokenizer, "the fox")
    answer = await worker.openai.completions.create(model="echo", prompt="x", logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == "the fox"
    assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(len(found.tokens))]
    assert all(tops for tops in found.top_logprobs)


async def test_a_tenant_s_requests_are_salted_apart(worker: Worker) -> None:
    for path, asked in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})):
        for own in ({}, {"cache_salt": "mine"}):
            body = {"model": "echo", "max_tokens": 1, **asked, **own}
            assert (await worker.http.post(path, json=body, headers={HEADER: "t"})).status_code == 200
    assert [r.cache_salt for r in worker.engine.submitted] == [salted("t", None), salted("t", "mine")] * 2


async def test_sampling_reaches_the_engine(worker: Worker) -> None:
    answer = await worker.post(
        "/v1/chat/completions",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 2.5},
        max_completion_tokens=9,
        min_tokens=2,
        stop_token_ids=[11],
        cache_salt="a tenant",
        n=2,
    )
    assert answer.status_code == 200, answer.text
    assert [request.cache_salt for request in worker.engine.submitted] == ["a tenant"] * 2
    first, second = (request.sampling for request in worker.engine.submitted)
    assert first.seed != second.seed
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.5, 0.9, 40, 9)
    assert (first.presence_penalty, first.frequency_penalty, first.min_tokens) == (0.5, -0.5, 2)
    assert first.logit_bias == {5: -100, 6: 2.5}
    assert first.stop_token_ids == {2, 11}
    assert first.logprobs is None


async def test_what_is_not_given_is_as_the_model_s_own_config_has_it(worker: Worker, tmp_path: Path) -> None:
    config = tmp_path / "generation_config.json"
    for text in ("[]", "{", '{"temperature": 9, "top_p": "a", "top_k": 1.5}'):
        config.write_text(text)
        assert model_defaults(str(tmp_path)) == {}
    config.write_text('{"temperature": 0.25, "top_p": 0.5, "top_k": 20, "eos_token_id": 2}')
    worker.service.sampling_defaults = model_defaults(str(tmp_path))

    async def asked(path: str, **body: Any) -> tuple[float, float, int]:
        await worker.post(path, **body)
        found = worker.engine.submitted[-1].sampling
        return found.temperature, found.top_p, found.top_k

    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4}),
    ]
    for path, body in bodies:
        assert await asked(path, **body) == (0.25, 0.5, 20)
        assert await asked(path, **body, temperature=1.0, top_p=1.0) == (1.0, 1.0, 20)


async def test_seeds(worker: Worker) -> None:
    async def seeds(**fields: Any) -> list[int]:
        worker.engine.submitted.clear()
        await worker.post("/v1/completions", prompt=["a", "b"], n=2, max_tokens=1, **fields)
        return [request.sampling.seed for request in worker.engine.submitted]

    one = await seeds(seed=7)
    assert one == await seeds(seed=7)
    # A list of prompts is as many requests: the same seed gives each the same noise.
    assert one[:2] == one[2:]
    assert one[0] != one[1]
    assert not set(one) & set(await seeds(seed=8))
    drawn = await seeds()
    assert len({*drawn, *await seeds()}) == 8
    assert all(0 <= seed < 2**63 for seed in [*one, *drawn])


async def test_harmless_fields_are_taken(worker: Worker) -> None:
    answer = await worker.post(
        "/v1/chat/completions",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "joe"},
            {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": "d"},
        ],
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        service_tier="auto",
        max_tokens=None,
        stop=None,
        seed=None,
        logit_bias=None,
    )
    assert answer.status_code == 200, answer.text


async def test_embeddings(embedding_worker: Worker) -> None:
    api = embedding_worker.openai
    answer = await api.embeddings.create(model="echo", input="hi there")
    assert answer.data[0].embedding[1:3] == [2.0, 3.0]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == answer.data[0].embedding[0]
    many = await api.embeddings.create(model="echo", input=[f"number {n}" for n in range(70)])
    assert [entry.index for entry in many.data] == list(range(70))
    ids = await api.embeddings.create(model="echo", input=[[4, 5], [6]])
    assert [entry.embedding[:3] for entry in ids.data] == [[2.0, 4.0, 5.0], [1.0, 6.0, 6.0]]
    raw = await embedding_worker.post("/v1/embeddings", input="hi", encoding_format="base64", dimensions=4)
    vector = struct.unpack("<4f", base64.b64decode(raw.json()["data"][0]["embedding"]))
    plain = await embedding_worker.post("/v1/embeddings", input="hi")
    assert list(vector) == plain.json()["data"][0]["embedding"]
    CreateEmbeddingResponse.model_validate_json(plain.text, strict=True, extra="forbid")


async def test_each_kind_of_model_names_its_own_endpoints(worker: Worker, embedding_worker: Worker) -> None:
    error = await worker.refused("/v1/embeddings", input="a")
    assert "/v1/chat/completions" in error["message"]
    for path, body in [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})]:
        assert "/v1/embeddings" in (await embedding_worker.refused(path, **body))["message"]


async def test_embeddings_that_are_refused(embedding_worker: Worker) -> None:
    for body, param in [
        ({"input": "a " * 100}, "input"),
        ({"input": ["b", "a " * 100]}, "input[1]"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [["a"]]}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ]:
        assert (await embedding_worker.refused("/v1/embeddings", **body))["param"] == param, body


async def test_not_resident(worker: Worker) -> None:
    worker.service.close_gate()
    for path, body in [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})]:
        for stream in (False, True):
            answer = await worker.post(path, **body, stream=stream)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "not_resident"
            assert int(answer.headers["retry-after"]) >= 1
    # A wrong request is told so all the same.
    await worker.refused("/v1/completions", prompt="a", temperature=9)
    assert (await worker.http.get("/health")).json() == {"status": "ok", "resident": False}
    worker.service.open_gate()
    assert (await worker.post("/v1/completions", prompt="a")).status_code == 200


async def test_a_demotion_ends_what_runs(make_worker: MakeWorker) -> None:
    body = {"model": "echo", "prompt": "a", "max_tokens": 1000}
    async with make_worker(lambda _: [7] * 1000, 0.02) as worker:
        whole = asyncio.create_task(worker.http.post("/v1/completions", json=body))
        async with worker.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = (line async for line in stream.aiter_lines() if line)
            await anext(lines)
            await until(lambda: worker.engine.live == 2)
            worker.service.close_gate()
            worker.engine.demote()
            rest = [line async for line in lines]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "not_resident"
        assert (await whole).status_code == 503
        await until(lambda: not worker.service.in_flight)


async def test_an_engine_that_fails(make_worker: MakeWorker) -> None:
    async with make_worker(lambda _: [7] * 1000, 0.02) as worker:
        stream = asyncio.create_task(events(worker, "/v1/completions", prompt="a", max_tokens=1000))
        await until(lambda: bool(worker.engine.live))
        await asyncio.sleep(0.2)
        worker.engine.break_with = "a step failed: out of luck"
        data = await stream
        assert json.loads(data[-1])["error"]["message"] == "a step failed: out of luck"
        answer = await worker.post("/v1/completions", prompt="a")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slots(make_worker: MakeWorker, stream: bool) -> None:
    async with make_worker(lambda _: [7] * 2000, 0.02) as worker:
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=worker.socket_path), base_url="http://worker"
        ) as client:
            body = {"model": "echo", "prompt": "a", "n": 3, "max_tokens": 2000, "stream": stream}
            task = asyncio.create_task(client.post("/v1/completions", json=body, timeout=60))
            await until(lambda: worker.engine.live >= 3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await asyncio.to_thread(worker.engine.wait_until_idle, 10)
        await until(lambda: not worker.service.in_flight)
        assert (await worker.http.get("/health")).status_code == 200


async def test_a_reader_that_stops_reading_loses_its_slot(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SEND_TIMEOUT_S", 0.5)
    async with make_worker(lambda _: [7] * 2000) as worker:
        reader, writer = await asyncio.open_unix_connection(worker.socket_path)
        body = json.dumps(
            {"model": "echo", "prompt": "a", "n": 100, "max_tokens": 1000, "stream": True, "logprobs": 5}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: w\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)
        await writer.drain()
        await until(lambda: bool(worker.engine.submitted))
        worker.engine.step_s = 0.005
        assert await asyncio.to_thread(worker.engine.wait_until_idle, 30)
        assert worker.engine.aborted, "it ended by itself: nothing was shown"
        assert (await worker.post("/v1/completions", prompt="a")).status_code == 200
        writer.close()
        del reader


async def test_it_answers_one_model_alone(worker: Worker) -> None:
    with pytest.raises(openai.NotFoundError, match="'other'"):
        await worker.openai.chat.completions.create(model="other", messages=HELLO)


async def test_unknown_paths(worker: Worker) -> None:
    answer = await worker.http.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (await worker.http.get("/v1/completions")).status_code == 405


async def test_requests_in_flight_are_counted(make_worker: MakeWorker) -> None:
    async with make_worker(lambda _: [7] * 20, 0.05) as worker:
        tasks = [asyncio.create_task(worker.post("/v1/completions", prompt="a")) for _ in range(3)]
        await until(lambda: worker.engine.live >= 3)
        assert worker.service.status()["in_flight"] == 3
        await asyncio.gather(*tasks)
        assert worker.service.status()["in_flight"] == 0


async def test_not_resident_error_is_itself(worker: Worker) -> None:
    worker.service.close_gate()
    with pytest.raises(NotResident):
        worker.service.check_open()


async def test_tokens_of_a_prompt_and_of_a_conversation(worker: Worker, tokenizer: Tokenizer) -> None:
    text = "hello <|im_start|> there"
    for body, expected in (
        ({"prompt": text}, tokenizer.encode(text, LIMIT)),
        ({"prompt": text, "add_special_tokens": False}, tokenizer.encode(text, LIMIT, special=False)),
        ({"messages": HELLO}, tokenizer.encode_chat(HELLO, LIMIT)),
    ):
        answer = await worker.http.post("/tokenize", json={"model": "echo", **body})
        assert answer.status_code == 200
        found = answer.json()
        assert found["tokens"] == expected
        assert found["count"] == len(expected)
        assert found["token_strs"] is None
        back = await worker.http.post("/detokenize", json={"model": "echo", "tokens": expected})
        assert back.json() == {"prompt": tokenizer.text(expected)}
    answer = await worker.http.post("/tokenize", json={"model": "echo", "prompt": "hello", "return_token_strs": True})
    assert "".join(answer.json()["token_strs"]) == "hello"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_is_no_token_request_is_refused(worker: Worker, path: str, body: dict[str, Any], param: str) -> None:
    answer = await worker.http.post(path, content=json.dumps({"model": "echo", **body}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
