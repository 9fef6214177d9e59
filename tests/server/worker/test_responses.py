"""OpenAI's Responses through the openai package, on an engine that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response

from mball.server.http import is_whole
from mball.server.worker.tokenizer import Tokenizer
from tests.server.worker.conftest import Worker, echoing, taught_tokenizer
from tests.server.worker.test_tools import HERMES_TEMPLATE, say, written

PATH = "/v1/responses"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return taught_tokenizer(tiny_model, tmp_path_factory.mktemp("taught"), HERMES_TEMPLATE)


@pytest.fixture
async def worker(taught: Tokenizer, tmp_path: Path) -> AsyncIterator[Worker]:
    async with echoing(taught, tmp_path / "w.sock") as worker:
        yield worker


async def streamed(worker: Worker, **body: Any) -> tuple[Response, list[Any]]:
    """What the package makes of the events, and they themselves."""
    async with worker.openai.responses.stream(model="echo", **body) as stream:
        events = [event async for event in stream]
    final: Any = events[-1].response
    assert [event.sequence_number for event in events] == sorted({event.sequence_number for event in events})
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return final, events


def plain(response: Response) -> list[Any]:
    """The output without what differs from answer to answer."""
    return [
        item.model_dump(exclude={"id", "call_id", "parsed_arguments"}, exclude_none=True) for item in response.output
    ]


async def test_a_text_whole_and_streamed(worker: Worker) -> None:
    say(worker, "naïve 日本!")
    body: dict[str, Any] = {"input": "hello there", "instructions": "Be brief.", "temperature": 0.5}
    answer = await worker.openai.responses.create(model="echo", **body)
    assert (answer.status, answer.output_text) == ("completed", "naïve 日本!")
    request = worker.engine.submitted[-1]
    assert request.sampling.temperature == 0.5
    assert "system\nBe brief." in worker.service.tokenizer.text(request.prompt)
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(request.prompt)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    final, events = await streamed(worker, **body)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "naïve 日本!"
    assert final.usage == answer.usage
    assert final.output_text == answer.output_text
    kinds = [event.type for event in events]
    for name in ("output_item", "content_part"):
        assert kinds.count(f"response.{name}.added") == kinds.count(f"response.{name}.done") == 1


async def test_the_last_event_says_it_is_the_last_and_what_it_took(worker: Worker) -> None:
    """To one who sees the end of the stream alone, as the gateway does."""
    say(worker, "the quick brown fox jumps over the lazy dog " * 130)
    body = {"model": "echo", "input": "hello", "stream": True}
    async with worker.http.stream("POST", PATH, content=json.dumps(body)) as answer:
        data = b"".join([chunk async for chunk in answer.aiter_bytes()])
    assert is_whole(PATH, data[-4096:])
    assert not is_whole(PATH, data[:-2][-4096:])
    events = data.split(b"\n\n")
    for end in range(1, len(events) - 1, 40):
        assert not is_whole(PATH, (b"\n\n".join(events[:end]) + b"\n\n")[-4096:])


async def test_one_that_is_cut_short(worker: Worker) -> None:
    answer = await worker.openai.responses.create(model="echo", input="hello there", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    final, events = await streamed(worker, input="hello there", max_output_tokens=2)
    assert events[-1].type == "response.incomplete"
    assert final.status == "incomplete"


async def test_tools_there_and_back(worker: Worker) -> None:
    say(worker, "I look.\n" + written("hermes", "weather", '{"city": "Köln"}'))
    body: dict[str, Any] = {"input": "hello", "tools": TOOLS}
    answer = await worker.openai.responses.create(model="echo", **body)
    text, call = answer.output
    assert text.type == "message"
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("weather", '{"city": "Köln"}', "completed")
    final, events = await streamed(worker, **body)
    assert plain(final) == plain(answer)
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == call.arguments
    say(worker, "Sunny.")
    back: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        *[item.model_dump(exclude_none=True) for item in answer.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "20 degrees"},
    ]
    await worker.openai.responses.create(model="echo", input=back, tools=TOOLS)
    prompt = worker.service.tokenizer.text(worker.engine.submitted[-1].prompt)
    assert written("hermes", "weather", '{"city": "Köln"}') in prompt
    assert "20 degrees" in prompt


async def test_logprobs_and_a_schema(worker: Worker) -> None:
    say(worker, "hi")
    include: list[Any] = ["message.output_text.logprobs"]
    answer = await worker.openai.responses.create(model="echo", input="a", include=include, top_logprobs=2)
    assert answer.output[0].content[0].logprobs  # type: ignore[union-attr]
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": {"const": 1}}}
    await worker.openai.responses.create(model="echo", input="a", text=form)
    assert worker.engine.submitted[-1].grammar is not None
    error = await worker.refused(PATH, input="a", text={"format": {**form["format"], "schema": {"type": "objct"}}})
    assert "objct" in (error["message"] or "")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"conversation": "c"}, "conversation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [[[[1]]]]}]}, "input[0].content[0]"),
    ],
)
async def test_what_is_not_done_is_named(worker: Worker, body: Any, param: str) -> None:
    assert (await worker.refused(PATH, **{"input": "hello", **body}))["param"] == param


async def test_an_error_in_a_stream_is_an_event(worker: Worker) -> None:
    worker.engine.step_s = 0.02
    stream = await worker.openai.responses.create(model="echo", input="hello there", stream=True)
    last: Any = None
    async for event in stream:
        if event.type == "response.output_text.delta":
            worker.engine.break_with = "it broke"
        last = event
    assert (last.type, last.message) == ("error", "it broke")
