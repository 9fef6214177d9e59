"""JSON of a schema from a real engine with random weights, whose text is anything but JSON where it is free."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from llguidance import LLParserLimits

from mball.errors import InvalidRequest
from mball.server.engine.api import GenerateRequest, Output, SamplingParams
from mball.server.engine.engine import GenerateEngine
from mball.server.worker import structured
from mball.server.worker.schemas import MAX_SCHEMA_BYTES, read_response_format
from mball.server.worker.structured import Grammars
from mball.server.worker.tokenizer import Tokenizer
from tests.server.engine.driving import Run
from tests.server.worker.conftest import Worker, serving

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello there"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", "日本"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}

COSTLY = "^.*[a-m].{30}$"
"""Each character may be the first of the last thirty: a state for each set of them."""
COSTLY_FIELD = {"type": "object", "properties": {"a": {"type": "string", "pattern": COSTLY}}, "required": ["a"]}


def of_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture
async def real(tiny_engine: GenerateEngine, tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Worker]:
    async with serving(tiny_engine, tokenizer, tmp_path / "w.sock") as worker:
        yield worker


async def answers(worker: Worker, **body: Any) -> list[str]:
    found = await worker.openai.chat.completions.create(model="echo", messages=HELLO, **body)
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    return [choice.message.content or "" for choice in found.choices]


async def test_every_choice_is_json_of_the_schema_beside_free_requests(real: Worker) -> None:
    ask = {"response_format": of_schema(SCHEMA), "n": 3, "seed": 1, "temperature": 1.5, "logprobs": True}
    free = {"max_tokens": 30, "seed": 2}

    async def freely() -> str | None:
        answer = await real.openai.chat.completions.create(model="echo", messages=HELLO, **free)
        return answer.choices[0].message.content

    alone = await freely()
    together = await asyncio.gather(answers(real, **ask), freely(), answers(real, **ask | {"top_p": 0.9}), freely())
    for text in (*together[0], *together[2]):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(together[0])) == 3
    assert together[1] == together[3] == alone, "a free request is not touched by its neighbours' grammars"
    assert await answers(real, **ask) == together[0], "a seed draws the same in any batch"


async def test_greedy_streamed_and_whole_agree(real: Worker) -> None:
    ask: dict[str, Any] = {"response_format": of_schema(SCHEMA), "temperature": 0}
    (whole,) = await answers(real, **ask)
    stream = await real.openai.chat.completions.create(model="echo", messages=HELLO, stream=True, **ask)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == whole
    jsonschema.validate(json.loads(whole), SCHEMA)


async def test_json_object(real: Worker) -> None:
    bias = {str(token): 100 for token in real.service.tokenizer._backend.encode("}").ids}
    (text,) = await answers(real, response_format={"type": "json_object"}, seed=3, logit_bias=bias)
    assert isinstance(json.loads(text), dict)


async def test_a_stop_string_and_the_longest_answer_still_end_it(real: Worker) -> None:
    ask: dict[str, Any] = {"model": "echo", "messages": HELLO, "response_format": of_schema(SCHEMA), "seed": 1}
    short = await real.openai.chat.completions.create(**ask, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    stopped = await real.openai.chat.completions.create(**ask, stop='"age"')
    assert stopped.choices[0].finish_reason == "stop"
    assert '"age"' not in (stopped.choices[0].message.content or "")


async def test_logprobs_are_those_of_the_model_and_not_of_the_grammar(real: Worker) -> None:
    ask: dict[str, Any] = {"model": "echo", "messages": HELLO, "logprobs": True, "top_logprobs": 1, "temperature": 0}
    free = await real.openai.chat.completions.create(**ask, max_tokens=1)
    kept = await real.openai.chat.completions.create(**ask, response_format={"type": "json_object"}, max_tokens=1)
    assert free.choices[0].logprobs is not None
    assert kept.choices[0].logprobs is not None
    first, other = free.choices[0].logprobs.content[0], kept.choices[0].logprobs.content[0]  # type: ignore[index]
    assert first.top_logprobs == other.top_logprobs
    assert other.logprob < first.logprob


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "objct"}, "objct"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "not present"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "Unsatisfiable"),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(1200)}}, "items"),
        ({"x-guidance": {"no_such": 1}}, "no_such"),
        ({"const": "\ud800"}, "surrogate|hex"),
        ([], "object"),
        ({"type": "integer", "multipleOf": 1234567}, "1234567"),
        ({"items": {"allOf": [{"multipleOf": 0.997}, {"multipleOf": 91}]}}, "90727"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "bytes"),
    ],
)
async def test_a_schema_that_cannot_be_kept_to_is_named(real: Worker, schema: Any, why: str) -> None:
    answer = await real.post(CHAT, messages=HELLO, response_format=of_schema(schema))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("response_format")
    assert any(word in error["message"] for word in why.split("|")), error


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many for the 500 tokens here as a model's own vocabulary has for its 50,000."""
    monkeypatch.setattr(structured, "_LIMITS", LLParserLimits(max_lexer_states=300, verbose_errors=False))


@pytest.mark.usefixtures("few_states")
async def test_a_pattern_that_takes_too_many_states_is_named_before_the_answer_begins(real: Worker) -> None:
    for stream in (False, True):
        error = await real.refused(CHAT, messages=HELLO, response_format=of_schema(COSTLY_FIELD), stream=stream)
        assert error["code"] == "invalid_schema"
        assert COSTLY in error["message"]
        assert "states" in error["message"]


@pytest.mark.usefixtures("few_states")
async def test_limits_that_show_in_the_answer_alone(real: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_REHEARSED", 0)
    ask: dict[str, Any] = {"messages": HELLO, "response_format": of_schema(COSTLY_FIELD), "seed": 1}
    error = await real.refused(CHAT, **ask)
    assert (error["param"], error["code"]) == ("response_format", "invalid_schema")
    streamed = (await real.post(CHAT, stream=True, **ask)).text.strip().splitlines()
    assert json.loads(streamed[-1].removeprefix("data: "))["error"] == error


async def test_what_only_looks_like_a_pattern(real: Worker) -> None:
    schema = {"const": {"pattern": "("}}
    (text,) = await answers(real, response_format=of_schema(schema), seed=1)
    assert json.loads(text) == {"pattern": "("}


async def test_what_does_not_go_with_a_schema(real: Worker) -> None:
    for field, value in (("ignore_eos", True), ("min_tokens", 3)):
        error = await real.refused(CHAT, messages=HELLO, response_format={"type": "json_object"}, **{field: value})
        assert error["param"] == field


async def test_the_loop_is_free_while_a_schema_is_compiled(real: Worker) -> None:
    """The largest schema takes tenths of a second; the loop never waits for that long."""
    large = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1200)}}
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began)

    def compiled() -> float:
        began = time.perf_counter()
        with contextlib.suppress(InvalidRequest):
            Grammars(real.service.tokenizer, 512, frozenset({2})).of_schema(json.dumps(large), "x")
        return time.perf_counter() - began

    alone_s = compiled()
    ticking = asyncio.create_task(tick())
    await asyncio.gather(*(real.post(CHAT, messages=HELLO, response_format=of_schema(large)) for _ in range(2)))
    ticking.cancel()
    await asyncio.wait({ticking})
    assert longest < 2 * alone_s


def test_a_model_whose_tokenizer_is_not_known_says_so(tmp_path: Path, tokenizer_dir: Any) -> None:
    grammars = Grammars(Tokenizer(str(tokenizer_dir("word_piece"))), 400, frozenset({2}))
    with pytest.raises(InvalidRequest, match="tokenizer"):
        grammars.of_schema("{}", "x")


def test_tokenizers_with_a_space_before_the_text(tokenizer_dir: Any) -> None:
    tokenizer = Tokenizer(str(tokenizer_dir("metaspace")))
    grammar = Grammars(tokenizer, tokenizer.vocab_size, frozenset({2})).of_schema('{"const": "the quick"}', "x")
    ids: list[int] = []
    while not (allowed := grammar.allowed(tokenizer.vocab_size))[2]:
        ids.append(int(allowed.argmax()))
        assert grammar.accept(ids[-1])
    assert json.loads(tokenizer.decode(ids)) == "the quick"


def test_a_sequence_whose_grammar_fails_ends_with_an_error(tiny_engine: GenerateEngine, tokenizer: Tokenizer) -> None:
    """One that was used up already: no token is allowed, and the engine goes on with the others."""
    grammar = Grammars(tokenizer, 512, frozenset({2})).of_schema("{}", "x")
    assert not grammar.accept(tokenizer._backend.encode("}").ids[0])
    outputs: list[Output] = []
    done = Run(tiny_engine, "free", [5, 6, 7], max_tokens=4)
    tiny_engine.submit(
        GenerateRequest("g", [5, 6], SamplingParams(max_tokens=4, seed=1), grammar=grammar), outputs.append
    )
    done.wait()
    Run(tiny_engine, "after", [5, 6, 7], max_tokens=4).wait()
    assert outputs[-1].finish_reason == "error"
    assert "grammar" in (outputs[-1].error or "")


def test_text_asks_for_nothing() -> None:
    assert read_response_format({"type": "text"}) is None
