"""An answer as OpenAI's `/v1/responses` has it, whole and as its events
(https://platform.openai.com/docs/api-reference/responses-streaming)."""

from __future__ import annotations

import secrets
import time
from typing import Any

from mball.errors import MballError
from mball.server.engine.api import Output
from mball.server.http import stream_error
from mball.server.worker.calls import CallPiece, CallReader
from mball.server.worker.formats import Json, Usage, event, token_logprobs
from mball.server.worker.generation import Delta
from mball.server.worker.responses_request import ResponsesRequest
from mball.server.worker.tokenizer import Tokenizer

PATH = "/v1/responses"


class ResponsesFormat:
    """Of one choice. The events are made first; a whole answer is what they come to."""

    def __init__(
        self, request: ResponsesRequest, tokenizer: Tokenizer, logprobs: int | None, reader: CallReader | None
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._reader = reader
        self._response = _response(request)
        self._output: list[Json] = []
        self._open = False
        self._number = -1
        self._finish: str | None = None

    def opening(self) -> list[bytes]:
        return [self._event(f"response.{name}", response=self._snapshot(None)) for name in ("created", "in_progress")]

    def events(self, delta: Delta) -> list[bytes]:
        events: list[bytes] = []
        if self._reader is None:
            pieces: list[str | CallPiece] = [delta.text] if delta.text or delta.tokens else []
        else:
            pieces = list(self._reader.add(delta.text, end=delta.finish_reason is not None))
        tokens = delta.tokens
        for piece in pieces:
            if isinstance(piece, str):
                events += self._text(piece, tokens)
                tokens = []
            else:
                events += self._call(piece)
        self._finish = delta.finish_reason or self._finish
        return events

    def closing(self, usage: Usage) -> list[bytes]:
        ended = self._end()
        return [*ended, self._event(f"response.{self._status}", response=self._snapshot(usage))]

    def failure(self, error: MballError) -> bytes:
        return stream_error(error, PATH)

    def whole(self, choices: list[Delta], usage: Usage) -> Json:
        for delta in choices:
            self.events(delta)
        self._end()
        return self._snapshot(usage)

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _text(self, text: str, tokens: list[Output]) -> list[bytes]:
        events: list[bytes] = []
        if not self._open or self._output[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "id": _id("msg"), "status": "in_progress", "role": "assistant", "content": []}
            events += self._begin(item)
            self._output[-1]["content"] = [part]
            events.append(self._of_part("response.content_part.added", part=dict(part)))
        part = self._output[-1]["content"][0]
        found = [] if self._logprobs is None else token_logprobs(self._tokenizer, tokens, self._logprobs)
        part["text"] += text
        part["logprobs"] += found
        events.append(self._of_part("response.output_text.delta", delta=text, logprobs=found))
        return events

    def _call(self, piece: CallPiece) -> list[bytes]:
        events: list[bytes] = []
        if piece.name is not None:
            item = {"type": "function_call", "id": _id("fc"), "call_id": piece.id, "name": piece.name, "arguments": ""}
            events += self._begin({**item, "status": "in_progress"})
        if piece.arguments:
            self._output[-1]["arguments"] += piece.arguments
            events.append(self._of_item("response.function_call_arguments.delta", delta=piece.arguments))
        return events

    def _begin(self, item: Json) -> list[bytes]:
        ended = self._end()
        self._open = True
        self._output.append(item)
        added = self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))
        return [*ended, added]

    def _end(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = False
        item = self._output[-1]
        item["status"] = self._status
        if item["type"] == "message":
            part = item["content"][0]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._of_part("response.output_text.done", **done),
                self._of_part("response.content_part.done", part=part),
            ]
        else:
            events = [self._of_item("response.function_call_arguments.done", arguments=item["arguments"])]
        return [*events, self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)]

    def _of_item(self, name: str, **fields: Any) -> bytes:
        at = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(name, **at, **fields)

    def _of_part(self, name: str, **fields: Any) -> bytes:
        return self._of_item(name, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **fields}, name)

    def _snapshot(self, usage: Usage | None) -> Json:
        """Its usage is the last of it, where the gateway reads it."""
        status = "in_progress" if usage is None else self._status
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        moment = {"status": status, "incomplete_details": why, "output": self._output if usage is not None else []}
        return {**self._response, **moment, "usage": None if usage is None else _usage(usage)}


def _response(request: ResponsesRequest) -> Json:
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "background": False,
        "error": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}, **request.text},
        "tool_choice": request.tool_choice,
        "tools": request.tools,
        "top_logprobs": request.top_logprobs,
        "top_p": request.top_p,
        "truncation": "disabled",
    }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
