"""The two shapes of a generated answer: chat and completion, whole and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mball.server.engine.api import Logprob, Output
from mball.server.worker.generation import Delta
from mball.server.worker.tokenizer import Tokenizer

Json = dict[str, Any]

_LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI's own stand-in."""


class Format(Protocol):
    """What one endpoint calls things. A choice's `delta` is everything new of it (whole answers: everything)."""

    id_prefix: str
    object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The choice of a stream's first chunk, where there is one."""

    def chunk(self, delta: Delta) -> Json:
        """A choice in a stream."""

    def whole(self, delta: Delta) -> Json:
        """A choice of a whole answer."""


class ChatFormat:
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text or delta.tokens else {}
        return {"index": delta.index, "delta": content, **self._rest(delta)}

    def whole(self, delta: Delta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": delta.index, "message": message, **self._rest(delta)}

    def _rest(self, delta: Delta) -> Json:
        content = [self._token(output) for output in delta.tokens]
        logprobs = {"content": content, "refusal": None} if self._logprobs is not None else None
        return {"logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _token(self, output: Output) -> Json:
        tops = output.top_logprobs[: self._logprobs]
        return {**self._logprob(output.logprob), "top_logprobs": [self._logprob(top) for top in tops]}

    def _logprob(self, entry: Logprob | None) -> Json:
        if entry is None:
            return {"token": "", "logprob": _LEAST_LOGPROB, "bytes": []}
        data = self._tokenizer.token_bytes(entry.token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(entry), "bytes": list(data)}


class CompletionFormat:
    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self._text: Callable[[int], str] = tokenizer.token_text
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json:
        logprobs = self._entries(delta) if self._logprobs is not None else None
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    whole = chunk

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
