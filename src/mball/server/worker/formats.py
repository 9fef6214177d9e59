"""OpenAI's two formats of a generated answer: chat and completion, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mball.errors import MballError
from mball.server.engine.api import Logprob, Output
from mball.server.http import error_body
from mball.server.worker.calls import CallPiece, CallReader
from mball.server.worker.generation import Delta
from mball.server.worker.tokenizer import Tokenizer

Json = dict[str, Any]

_LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's own stand-in."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole answer; `cached` ones of the prompt were not computed."""

    prompt: int
    completion: int
    cached: int

    def openai(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Format(Protocol):
    """One answer as its endpoint has it: server-sent events while it comes, or an object once it is whole."""

    def opening(self) -> list[bytes]:
        """The events before the first token's."""

    def events(self, delta: Delta) -> list[bytes]:
        """Those of what is new of one choice."""

    def closing(self, usage: Usage) -> list[bytes]:
        """The last events."""

    def failure(self, error: MballError) -> bytes:
        """The last event of a stream that breaks off."""

    def whole(self, choices: list[Delta], usage: Usage) -> Json:
        """All of it; each delta is everything of its choice."""


def event(data: Json, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class _Envelope:
    """What OpenAI's two formats have around their choices."""

    def __init__(self, prefix: str, whole: str, chunk: str, served: tuple[str, str], *, include_usage: bool) -> None:
        """`served`: the model's name and the fingerprint."""
        model, fingerprint = served
        self._whole, self._chunk = whole, chunk
        self._include_usage = include_usage
        self._id = prefix + secrets.token_hex(12)
        self._rest = {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        chunk = {"id": self._id, "object": self._chunk, **self._rest, "choices": choices}
        return event({**chunk, "usage": usage} if self._include_usage else chunk)

    def closing(self, usage: Usage) -> list[bytes]:
        last = [self.event([], usage.openai())] if self._include_usage else []
        return [*last, b"data: [DONE]\n\n"]

    def whole(self, choices: list[Json], usage: Usage) -> Json:
        return {"id": self._id, "object": self._whole, **self._rest, "choices": choices, "usage": usage.openai()}


class ChatFormat:
    def __init__(
        self,
        tokenizer: Tokenizer,
        logprobs: int | None,
        served: tuple[str, str],
        readers: Sequence[CallReader | None],
        *,
        include_usage: bool,
    ) -> None:
        """`readers`: one a choice, None where no tool may be called."""
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._readers = readers
        self._envelope = _Envelope(
            "chatcmpl-", "chat.completion", "chat.completion.chunk", served, include_usage=include_usage
        )
        self.closing = self._envelope.closing

    def opening(self) -> list[bytes]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            self._envelope.event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(len(self._readers))
        ]

    def events(self, delta: Delta) -> list[bytes]:
        text, calls = self._read(delta)
        content: Json = {"content": text} if text or (delta.tokens and not calls) else {}
        if calls:
            content["tool_calls"] = [_call_delta(piece) for piece in calls]
        if not content and delta.finish_reason is None:
            return []
        return [self._envelope.event([{"index": delta.index, "delta": content, **self._rest(delta)}])]

    def failure(self, error: MballError) -> bytes:
        return event(error_body(error))

    def whole(self, choices: list[Delta], usage: Usage) -> Json:
        return self._envelope.whole([self._choice(delta) for delta in choices], usage)

    def _choice(self, delta: Delta) -> Json:
        text, calls = self._read(delta)
        message: Json = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        if calls:
            message |= {"content": text or None, "tool_calls": whole_calls(calls)}
        return {"index": delta.index, "message": message, **self._rest(delta)}

    def _read(self, delta: Delta) -> tuple[str, list[CallPiece]]:
        reader = self._readers[delta.index]
        if reader is None:
            return delta.text, []
        pieces = reader.add(delta.text, end=delta.finish_reason is not None)
        if reader.called and delta.finish_reason == "stop":
            delta.finish_reason = "tool_calls"
        return "".join(p for p in pieces if isinstance(p, str)), [p for p in pieces if isinstance(p, CallPiece)]

    def _rest(self, delta: Delta) -> Json:
        logprobs = None
        if self._logprobs is not None:
            logprobs = {"content": token_logprobs(self._tokenizer, delta.tokens, self._logprobs), "refusal": None}
        return {"logprobs": logprobs, "finish_reason": delta.finish_reason}


def token_logprobs(tokenizer: Tokenizer, outputs: Sequence[Output], most: int) -> list[Json]:
    """Of each token, with at most so many alternatives."""

    def of(entry: Logprob | None) -> Json:
        if entry is None:
            return {"token": "", "logprob": _LEAST_LOGPROB, "bytes": []}
        data = tokenizer.token_bytes(entry.token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(entry), "bytes": list(data)}

    return [{**of(o.logprob), "top_logprobs": [of(top) for top in o.top_logprobs[:most]]} for o in outputs]


def _call_delta(piece: CallPiece) -> Json:
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def whole_calls(pieces: Sequence[CallPiece]) -> list[Json]:
    """As a message has them."""
    calls: list[Json] = []
    for piece in pieces:
        if piece.name is not None:
            calls.append({"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}})
        calls[piece.index]["function"]["arguments"] += piece.arguments
    return calls


class CompletionFormat:
    def __init__(
        self, tokenizer: Tokenizer, logprobs: int | None, served: tuple[str, str], *, include_usage: bool
    ) -> None:
        self._text: Callable[[int], str] = tokenizer.token_text
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}
        self._envelope = _Envelope("cmpl-", "text_completion", "text_completion", served, include_usage=include_usage)
        self.closing = self._envelope.closing

    def opening(self) -> list[bytes]:
        return []

    def events(self, delta: Delta) -> list[bytes]:
        return [self._envelope.event([self._choice(delta)])]

    def failure(self, error: MballError) -> bytes:
        return event(error_body(error))

    def whole(self, choices: list[Delta], usage: Usage) -> Json:
        return self._envelope.whole([self._choice(delta) for delta in choices], usage)

    def _choice(self, delta: Delta) -> Json:
        logprobs = self._entries(delta) if self._logprobs is not None else None
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _entries(self, delta: Delta) -> Json:
        tokens, offsets = [], []
        offset = self._offsets.get(delta.index, 0)
        for output in delta.tokens:
            token = "" if output.token_id is None else self._text(output.token_id)
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
        self._offsets[delta.index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if o.logprob is None else _finite(o.logprob) for o in delta.tokens],
            "top_logprobs": [self._tops(output) for output in delta.tokens] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _tops(self, output: Output) -> dict[str, float]:
        entries = output.top_logprobs[: self._logprobs]
        drawn = () if output.logprob is None else (output.logprob,)
        return {self._text(entry.token_id): _finite(entry) for entry in (*drawn, *entries)}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST_LOGPROB)
