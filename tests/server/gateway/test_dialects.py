"""The gateway before the APIs that workers have beside OpenAI's chat: forwarded as they are, errors in their shape."""

from __future__ import annotations

import json
from typing import Any

from mball.errors import Unavailable
from mball.server.http import is_whole, stream_error
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Start

MESSAGES = "/v1/messages"


async def test_they_are_forwarded_and_refused_in_their_own_shape(gateway: Start) -> None:
    running = await gateway(model("a"))

    async def ask(name: str, path: str) -> tuple[int, dict[str, Any]]:
        async with running.http.post(running.url + path, json={"model": name, "messages": []}) as response:
            return response.status, await response.json()

    assert (await ask("a", MESSAGES))[0] == 200
    status, body = await ask("b", MESSAGES)
    assert (status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
    status, body = await ask("b", f"{MESSAGES}/count_tokens")
    assert (status, body["type"]) == (404, "error")
    assert (await ask("a", f"{MESSAGES}/batches"))[0] in (404, 405)


async def test_a_stream_that_breaks_off_says_so_in_its_own_shape(gateway: Start) -> None:
    running = await gateway(model("a", Knobs(crash_at="request")), sse_keepalive_s=0.01)
    async with running.http.post(running.url + MESSAGES, json={"model": "a", "stream": True}) as response:
        text = (await response.read()).decode()
    *_, name, data = [line for line in text.splitlines() if line]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "overloaded_error"


def test_when_a_stream_was_whole() -> None:
    assert is_whole("/v1/chat/completions", b"x\n\ndata: [DONE]\n\n")
    assert is_whole(MESSAGES, b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert not is_whole(MESSAGES, b"data: [DONE]\n\n")
    assert stream_error(Unavailable("no"), "/v1/completions").startswith(b'data: {"error"')
