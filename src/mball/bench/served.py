"""A server that answers as OpenAI's does, asked for one of its models."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from mball.errors import MballError

PROMPT = list(range(5, 21))


@dataclass(frozen=True, slots=True)
class Said:
    """`first_token_s` from the request on; `end_s` when the last came."""

    first_token_s: float
    end_s: float
    tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Served:
    session: aiohttp.ClientSession
    model: str

    async def is_well(self) -> bool:
        try:
            async with self.session.get("/health") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def say(self, tokens: int, prompt: Sequence[int] = PROMPT) -> Said:
        """That many tokens, greedy, as a stream. Raises MballError."""
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        first, counted, text = 0.0, 0, []
        began = time.monotonic()
        async with self.session.post("/v1/completions", json=body) as answer:
            async for event in _events(answer, self.model):
                if event["choices"]:
                    first = first or time.monotonic() - began
                    text.append(event["choices"][0]["text"])
                if usage := event.get("usage"):
                    counted = usage["completion_tokens"]
        if not first or counted != tokens:
            raise MballError(f"{self.model}: {counted} tokens came of {tokens}")
        return Said(first, time.monotonic() - began, counted, "".join(text))

    async def rate(self, batch: int, tokens: int) -> float:
        """Tokens a second of that many requests at once, from the last one's first token to the end."""
        began = time.monotonic()
        said = await asyncio.gather(*(self.say(tokens, [*PROMPT, 30 + number]) for number in range(batch)))
        return (tokens - 1) * batch / (time.monotonic() - began - max(one.first_token_s for one in said))

    async def call(self, method: str, path: str, **options: Any) -> Any:
        """What it answers as JSON, or nothing. Raises MballError."""
        async with self.session.request(method, path, **options) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise MballError(f"{path}: {answer.status} {text[:300]}")
            return json.loads(text) if text.strip() else None


async def _events(answer: aiohttp.ClientResponse, model: str) -> AsyncIterator[dict[str, Any]]:
    if answer.status != 200:
        raise MballError(f"{model}: {answer.status} {(await answer.text())[:300]}")
    async for line in answer.content:
        content = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and content != b"[DONE]":
            event = json.loads(content)
            if "error" in event:
                raise MballError(f"{model}: {event['error']}")
            yield event
