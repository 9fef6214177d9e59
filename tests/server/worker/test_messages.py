"""Anthropic's protocol through the anthropic package, on an engine that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import pytest
from anthropic.types import Message

from mball.server.worker.tokenizer import Tokenizer
from tests.server.worker.conftest import Worker, echoing, taught_tokenizer
from tests.server.worker.test_tools import HERMES_TEMPLATE, say, written

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}]


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return taught_tokenizer(tiny_model, tmp_path_factory.mktemp("taught"), HERMES_TEMPLATE)


@pytest.fixture
async def worker(taught: Tokenizer, tmp_path: Path) -> AsyncIterator[Worker]:
    async with echoing(taught, tmp_path / "w.sock") as worker:
        yield worker


@pytest.fixture
async def client(worker: Worker) -> AsyncIterator[anthropic.AsyncAnthropic]:
    http = httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=worker.socket_path), base_url="http://worker")
    async with anthropic.AsyncAnthropic(
        api_key="none", base_url="http://worker", http_client=http, max_retries=0
    ) as client:
        yield client


async def streamed(client: anthropic.AsyncAnthropic, **body: Any) -> Message:
    """What the package itself makes of the events."""
    async with client.messages.stream(model="echo", max_tokens=300, **body) as stream:
        kinds = [event.type async for event in stream]
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop")
        return await stream.get_final_message()


def same(one: Message, other: Message) -> None:
    assert (one.stop_reason, one.stop_sequence) == (other.stop_reason, other.stop_sequence)
    assert one.usage.output_tokens == other.usage.output_tokens
    assert one.usage.input_tokens == other.usage.input_tokens
    blocks = [[block.model_dump(exclude={"id"}, exclude_none=True) for block in m.content] for m in (one, other)]
    assert blocks[0] == blocks[1]


async def test_a_text_whole_and_streamed(worker: Worker, client: anthropic.AsyncAnthropic) -> None:
    say(worker, "naïve 日本!")
    body: dict[str, Any] = {"messages": HELLO, "system": [{"type": "text", "text": "Be brief."}]}
    answer = await client.messages.create(
        model="echo", max_tokens=300, extra_body={"top_k": 3, "temperature": 0.5}, **body
    )
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "naïve 日本!"  # type: ignore[union-attr]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    request = worker.engine.submitted[-1]
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(request.prompt)
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.max_tokens) == (0.5, 3, 300)
    assert "system\nBe brief." in worker.service.tokenizer.text(request.prompt)
    same(answer, await streamed(client, **body))
    counted = await client.messages.count_tokens(model="echo", messages=HELLO, system="Be brief.")
    assert counted.input_tokens == len(request.prompt)


async def test_how_it_ended(worker: Worker, client: anthropic.AsyncAnthropic) -> None:
    say(worker, "the quick brown fox")
    body: dict[str, Any] = {"messages": HELLO, "stop_sequences": ["zebra", "brown"]}
    answer = await client.messages.create(model="echo", max_tokens=300, **body)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "brown")
    assert answer.content[0].text == "the quick "  # type: ignore[union-attr]
    same(answer, await streamed(client, **body))
    short = await client.messages.create(model="echo", max_tokens=1, messages=HELLO)
    assert short.stop_reason == "max_tokens"


async def test_tools_there_and_back(worker: Worker, client: anthropic.AsyncAnthropic) -> None:
    say(worker, "I look.\n" + written("hermes", "weather", '{"city": "Köln"}'))
    answer = await client.messages.create(model="echo", max_tokens=300, messages=HELLO, tools=TOOLS)
    assert answer.stop_reason == "tool_use"
    text, use = answer.content
    assert text.text == "I look.\n"  # type: ignore[union-attr]
    assert (use.type, use.name, use.input) == ("tool_use", "weather", {"city": "Köln"})  # type: ignore[union-attr]
    same(answer, await streamed(client, messages=HELLO, tools=TOOLS))
    say(worker, "Sunny.")
    back: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "thanks"},
                {"type": "tool_result", "tool_use_id": use.id, "content": "20 degrees"},  # type: ignore[union-attr]
            ],
        },
    ]
    await client.messages.create(model="echo", max_tokens=300, messages=back, tools=TOOLS)
    prompt = worker.service.tokenizer.text(worker.engine.submitted[-1].prompt)
    assert written("hermes", "weather", '{"city": "Köln"}') in prompt
    assert prompt.index("20 degrees") < prompt.index("thanks")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"temperature": 1.5}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "messages[1].role"),
        ({"messages": [{"role": "system", "content": "I"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ],
)
async def test_what_is_not_done_is_named_in_anthropics_shape(worker: Worker, body: Any, named: str) -> None:
    answer = await worker.post("/v1/messages", **{"max_tokens": 5, "messages": HELLO, **body})
    assert answer.status_code == 400, answer.text
    fields = answer.json()
    assert fields["type"] == "error"
    assert fields["error"]["type"] == "invalid_request_error"
    assert named in fields["error"]["message"]


async def test_a_deep_value_is_refused(worker: Worker) -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    use = {"type": "tool_use", "id": "a", "name": "b", "input": {"x": deep}}
    for body in (
        {"messages": [{"role": "user", "content": deep}]},
        {"messages": [{"role": "assistant", "content": [use]}, *HELLO]},
        {"messages": HELLO, "tools": [{"name": "a", "input_schema": {"x": deep}}]},
        {"messages": HELLO, "system": deep},
    ):
        answer = await worker.post("/v1/messages", max_tokens=5, **body)
        assert answer.status_code == 400, answer.text


async def test_errors_of_the_package(worker: Worker, client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="serves"):
        await client.messages.create(model="other", max_tokens=5, messages=HELLO)
    worker.engine.break_with = "it broke"
    with pytest.raises(anthropic.APIStatusError, match="it broke"):
        await client.messages.create(model="echo", max_tokens=5, messages=HELLO)


async def test_an_error_in_a_stream_is_an_event(worker: Worker) -> None:
    worker.engine.step_s = 0.02
    body = {"model": "echo", "max_tokens": 50, "messages": HELLO, "stream": True}
    lines: list[str] = []
    async with worker.http.stream("POST", "/v1/messages", content=json.dumps(body)) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: content_block_delta"):
                worker.engine.break_with = "it broke"
            lines.append(line)
    events = [line for line in lines if line]
    assert events[-2] == "event: error"
    error = json.loads(events[-1].removeprefix("data: "))
    assert error["type"] == "error"
    assert error["error"]["type"] == "api_error"
