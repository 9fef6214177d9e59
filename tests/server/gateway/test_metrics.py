"""What Prometheus reads: every request once, by status; tokens, times, the ladder."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mball.server.gateway.metrics import tokens_of, usage_in
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Gateway, Start

_REQUESTS = "mball:requests_total"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(gateway: Gateway) -> Samples:
    async with gateway.http.get(f"{gateway.url}/metrics") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        text = await answer.text()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


async def ended(gateway: Gateway, count: int) -> Samples:
    """Once so many requests have: the last bytes are with the client a moment before."""
    async with asyncio.timeout(30):
        while True:
            found = await scrape(gateway)
            if sum(value for (name, _), value in found.items() if name == _REQUESTS) >= count:
                return found


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


async def ask(gateway: Gateway, name: str, **body: Any) -> int:
    body = {"model": name, "messages": [{"role": "user", "content": "a"}], **body}
    async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json=body) as answer:
        await answer.read()
        return answer.status


async def test_requests_are_counted_by_how_they_ended(gateway: Start) -> None:
    running = await gateway(model("a"), model("b"))
    assert await ask(running, "a") == 200
    assert await ask(running, "a", stream=True, stream_options={"include_usage": True}) == 200
    assert await ask(running, "nobody\nserves{this}") == 404
    assert await ask(running, "another that is not there") == 404
    found = await ended(running, 4)
    assert at(found, _REQUESTS, model_name="a", code="200") == 2
    assert at(found, _REQUESTS, model_name="", code="404") == 2
    assert {dict(labels).get("model_name", "") for _, labels in found} == {"", "a", "b"}, "no label that a client made"
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_queue_time_seconds"):
        assert at(found, f"mball:{name}_count", model_name="a") == 2
        assert at(found, f"mball:{name}_sum", model_name="a") > 0
    assert at(found, "mball:generation_tokens_total", model_name="a") > 0
    assert at(found, "mball:prompt_tokens_total", model_name="a") > 0


async def test_a_client_that_leaves_is_counted_as_that(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(token_s=0.05, tokens=10_000)))
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(2):
            await ask(running, "a")
    assert at(await ended(running, 1), _REQUESTS, model_name="a", code="499") == 1


async def test_the_ladder_is_shown(gateway: Start) -> None:
    running = await gateway(model("a"), model("b"))
    assert await ask(running, "a") == 200
    await running.until(lambda: running.state("a")["shown_as"] == "device")
    found = await scrape(running)
    assert at(found, "mball:model_rung", model_name="a", rung="device") == 1
    assert at(found, "mball:model_rung", model_name="a", rung="source") == 0
    assert at(found, "mball:model_rung", model_name="b", rung="stopped") == 1
    assert at(found, "mball:model_device_bytes", model_name="a") == running.state("a")["device_bytes"] > 0
    assert at(found, "mball:model_promotions_total", model_name="a") == 1
    promoted = {"model_name": "a", "transition": "promoted", "weights_from": "source"}
    assert at(found, "mball:transition_seconds_count", **promoted) == 1
    [shown] = running.manager.snapshot()["devices"]
    assert at(found, "mball:device_promised_bytes", device=shown["name"]) == shown["promised_bytes"] > 0
    assert at(found, "mball:draining") == 0


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'{"choices": [], "usage": {"prompt_tokens": 3}}', {"prompt_tokens": 3}),
        (b'data: {"usage":null}\n\ndata: {"usage":{"a":{"b":1}}}\n\ndata: [DONE]\n\n', {"a": {"b": 1}}),
        (b'{"text": "\\"usage\\": {", "usage": {"x": 1}}', {"x": 1}),
        (b'"usage": {"cut', None),
        (b'"usage": {"\xff\xfe', None),
        (b"", None),
        (b'"usage": ' + b'{"a":' * 3000, None),
    ],
)
def test_usage_is_found_at_an_answers_end(tail: bytes, expected: dict[str, Any] | None) -> None:
    assert usage_in(tail) == expected


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}, (7, 2, 4)),
        ({"input_tokens": 7, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}, (7, 2, 4)),
        ({"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 4}, (7, 2, 4)),
        ({"input_tokens": "x", "output_tokens": True}, (0, 0, 0)),
    ],
)
def test_tokens_as_each_api_says_them(usage: dict[str, Any], tokens: tuple[int, int, int]) -> None:
    assert tokens_of(usage) == tokens
