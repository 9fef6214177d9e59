"""OpenAI's `/v1/responses` (https://platform.openai.com/docs/api-reference/responses) as a chat request, strictly.

Nothing is kept: each request holds its whole conversation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import Field

from mball.server.worker.parts import known, no_such, text_of
from mball.server.worker.protocol import ChatRequest, Real, Request, Salt, parse
from mball.server.worker.values import wrong

_HINTS = {"id", "status", "annotations", "logprobs", "phase", "created_by"}
"""Of an item or a part: they say nothing about the answer."""
_THOUGHTS = {"reasoning"}
"""Items that no chat template here takes back."""

_text = partial(text_of, kinds={"input_text", "output_text", "text"}, hints=_HINTS)


class ResponsesRequest(Request):
    """The lists and objects are read by `chat_request`. `store` is ignored: nobody can ask for what was stored."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: Real = Field(default=1.0, ge=0, le=2)
    top_p: Real = Field(default=1.0, ge=0, le=1)
    top_logprobs: int = Field(default=0, ge=0)
    include: list[str] = Field(default=[])
    stream: bool = False
    stream_options: dict[str, Any] = Field(default={})
    store: bool = True
    tools: list[Any] = Field(default=[])
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field(default={})
    reasoning: dict[str, Any] = Field(default={})
    truncation: str = "disabled"
    background: bool = False
    previous_response_id: str | None = None
    cache_salt: Salt | None = None


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """Raises InvalidRequest naming the field as the Responses API has it."""
    if request.previous_response_id is not None:
        raise wrong("previous_response_id", "is not supported here: no response is kept; send the whole `input`")
    if request.background:
        raise wrong("background", "is not supported here")
    if request.truncation != "disabled":
        raise wrong("truncation", "must be disabled")
    if any(value is not None for value in request.reasoning.values()):
        raise wrong("reasoning", "is not supported here")
    if unknown := set(request.include) - {"message.output_text.logprobs", "reasoning.encrypted_content"}:
        raise wrong("include", f"can't have {min(unknown)[:80]!r}")
    if unknown := request.stream_options.keys() - {"include_obfuscation"}:
        raise wrong(f"stream_options.{min(unknown)}", "is not known")
    logprobs = "message.output_text.logprobs" in request.include
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "max_completion_tokens": request.max_output_tokens,
        **{name: getattr(request, name) for name in ("temperature", "top_p") if name in request.model_fields_set},
        "stream": request.stream,
        "logprobs": logprobs,
        "top_logprobs": request.top_logprobs if logprobs else None,
        "tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools)],
        "tool_choice": _choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _format(request.text),
        "cache_salt": request.cache_salt,
    }
    return parse(ChatRequest, fields)


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    if not request.input:
        raise wrong("input", "must be a text or a list of at least one item")
    for index, item in enumerate(request.input):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """One item. Calls that follow each other, or the assistant's text, are of one message."""
    if not isinstance(item, dict):
        raise wrong(where, "must be an object")
    kind = item.get("type", "message")
    if kind == "message":
        known(item, {"type", "role", "content", *_HINTS}, where)
        messages.append({"role": item.get("role"), "content": _text(item.get("content"), f"{where}.content")})
    elif kind == "function_call":
        known(item, {"type", "call_id", "name", "arguments", *_HINTS}, where)
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        known(item, {"type", "call_id", "output", *_HINTS}, where)
        output = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind not in _THOUGHTS:
        raise no_such(kind, where)


def _tool(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise wrong(f"{where}.type", "must be function: no other tools are run here")
    known(value, {"type", "name", "description", "parameters", "strict", *_HINTS}, where)
    return {"type": "function", "function": {name: entry for name, entry in value.items() if name != "type"}}


def _choice(value: str | dict[str, Any]) -> Any:
    if isinstance(value, str):
        return value
    if value.get("type") != "function" or value.keys() - {"type", "name"}:
        raise wrong("tool_choice", "must be none, auto, required, or a function's type and name")
    return {"type": "function", "function": {"name": value.get("name")}}


def _format(value: dict[str, Any]) -> dict[str, Any] | None:
    if unknown := value.keys() - {"format", "verbosity"}:
        raise wrong(f"text.{min(unknown)}", "is not known")
    if value.get("verbosity") not in (None, "medium"):
        raise wrong("text.verbosity", "is not supported here")
    form = value.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: entry for name, entry in form.items() if name != "type"}}
