"""An answer as Anthropic's `/v1/messages` has it (https://docs.anthropic.com/en/api/messages-streaming)."""

from __future__ import annotations

import json
import secrets

from mball.errors import MballError
from mball.server.http import stream_error
from mball.server.worker.calls import CallReader, Piece
from mball.server.worker.formats import Json, Usage, event
from mball.server.worker.generation import Delta

PATH = "/v1/messages"


class AnthropicFormat:
    """Of one choice."""

    def __init__(self, model: str, prompt_tokens: int, reader: CallReader | None) -> None:
        self._reader = reader
        self._prompt_tokens = prompt_tokens
        self._head: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._index = -1
        self._open: str | None = None
        self._stop: Json = {}

    def opening(self) -> list[bytes]:
        usage = _usage(Usage(self._prompt_tokens, 0, 0))
        message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return [_event("message_start", message=message)]

    def events(self, delta: Delta) -> list[bytes]:
        events: list[bytes] = []
        for piece in self._pieces(delta):
            if isinstance(piece, str):
                if self._open != "text":
                    events += self._begin({"type": "text", "text": ""})
                events.append(self._delta({"type": "text_delta", "text": piece}))
                continue
            if piece.name is not None:
                events += self._begin({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
            if piece.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": piece.arguments}))
        if delta.finish_reason is not None:
            self._stop = self._stopped(delta)
        return events

    def closing(self, usage: Usage) -> list[bytes]:
        return [
            *self._end(),
            _event("message_delta", delta=self._stop, usage=_usage(usage)),
            _event("message_stop"),
        ]

    def failure(self, error: MballError) -> bytes:
        return stream_error(error, PATH)

    def whole(self, choices: list[Delta], usage: Usage) -> Json:
        (delta,) = choices
        content: list[Json] = []
        calls: list[str] = []
        for piece in self._pieces(delta):
            if isinstance(piece, str):
                content.append({"type": "text", "text": piece})
            elif piece.name is not None:
                content.append({"type": "tool_use", "id": piece.id, "name": piece.name})
                calls.append(piece.arguments)
            else:
                calls[-1] += piece.arguments
        uses = [block for block in content if block["type"] == "tool_use"]
        for block, arguments in zip(uses, calls, strict=True):
            block["input"] = _input(arguments)
        return {**self._head, "content": content, **self._stopped(delta), "usage": _usage(usage)}

    def _pieces(self, delta: Delta) -> list[Piece]:
        if self._reader is None:
            return [delta.text] if delta.text else []
        return self._reader.add(delta.text, end=delta.finish_reason is not None)

    def _stopped(self, delta: Delta) -> Json:
        reason = "end_turn"
        if self._reader is not None and self._reader.called and delta.finish_reason == "stop":
            reason = "tool_use"
        elif delta.finish_reason == "length":
            reason = "max_tokens"
        elif delta.stop is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": delta.stop if reason == "stop_sequence" else None}

    def _begin(self, block: Json) -> list[bytes]:
        ended = self._end()
        self._index += 1
        self._open = block["type"]
        return [*ended, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def _end(self) -> list[bytes]:
        ended = [] if self._open is None else [_event("content_block_stop", index=self._index)]
        self._open = None
        return ended


def _input(arguments: str) -> Json:
    """Of a call that was cut short: none."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _usage(usage: Usage) -> Json:
    """Anthropic's input tokens are those that were computed."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _event(name: str, **fields: object) -> bytes:
    return event({"type": name, **fields}, name)
