"""Anthropic's `/v1/messages` (https://docs.anthropic.com/en/api/messages) as a chat request, strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from mball.server.worker.parts import known, no_such, text_of
from mball.server.worker.protocol import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    ChatRequest,
    Real,
    Request,
    Salt,
    parse,
)
from mball.server.worker.values import shallow, wrong

_HINTS = {"cache_control", "citations"}
"""Of a block: they say nothing about the answer."""
_THOUGHTS = {"thinking", "redacted_thinking"}
"""Blocks of the assistant's that no chat template here takes back."""

_text = partial(text_of, kinds={"text"}, hints=_HINTS)


class CountRequest(Request):
    """What both requests have; the lists are read by `chat_request`."""

    messages: list[Any] = Field(min_length=1)
    system: str | list[Any] = ""
    tools: list[Any] = Field(default=[])
    tool_choice: dict[str, Any] = Field(default={"type": "auto"})
    thinking: dict[str, Any] = Field(default={"type": "disabled"})
    output_config: dict[str, Any] = Field(default={})


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] = Field(
        default=[], max_length=MAX_STOPS
    )
    stream: bool = False
    temperature: Real = Field(default=1.0, ge=0, le=1)
    top_p: Real = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=0)
    cache_salt: Salt | None = None


def chat_request(request: CountRequest) -> ChatRequest:
    """Raises InvalidRequest naming the field as Anthropic has it."""
    if request.thinking.get("type") != "disabled":
        raise wrong("thinking", "is not supported here")
    fields: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request),
        "tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools)],
        **_choice(request.tool_choice),
        **_format(request.output_config),
    }
    if isinstance(request, MessagesRequest):
        fields |= {
            "max_tokens": request.max_tokens,
            "stop": request.stop_sequences,
            "cache_salt": request.cache_salt,
            "stream": request.stream,
        }
        given = request.model_fields_set
        fields |= {name: getattr(request, name) for name in ("temperature", "top_p", "top_k") if name in given}
    return parse(ChatRequest, fields)


def _messages(request: CountRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system, "system")})
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise wrong(where, "must be an object with a `role` and a `content`, nothing else")
        role, content = message["role"], message["content"]
        if role not in ("user", "assistant"):
            raise wrong(f"{where}.role", "must be user or assistant")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise wrong(f"{where}.content", "must be a text or a list of blocks")
        messages += (_of_user if role == "user" else _of_assistant)(content, f"{where}.content")
    if messages[-1]["role"] == "assistant":
        raise wrong(f"messages[{len(request.messages) - 1}].role", "is assistant: an answer is not begun for the model")
    return messages


def _of_user(blocks: list[Any], where: str) -> list[dict[str, Any]]:
    """What tools answered comes first."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        kind = _kind(block, at)
        if kind == "text":
            texts.append(_text([block], where))
        elif kind == "tool_result":
            known(block, {"type", "tool_use_id", "content", "is_error", *_HINTS}, at)
            content = _text(block.get("content") or "", f"{at}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        else:
            raise no_such(kind, at)
    return [*results, *([{"role": "user", "content": "\n".join(texts)}] if texts or not results else [])]


def _of_assistant(blocks: list[Any], where: str) -> list[dict[str, Any]]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        kind = _kind(block, at)
        if kind == "text":
            texts.append(_text([block], where))
        elif kind == "tool_use":
            known(block, {"type", "id", "name", "input", *_HINTS}, at)
            shallow(block.get("input"), f"{at}.input")
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input"))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in _THOUGHTS:
            raise no_such(kind, at)
    return [{"role": "assistant", "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}]


def _kind(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise wrong(f"{where}.type", "must be there: text, tool_use or tool_result")
    return kind


def _tool(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") not in (None, "custom"):
        raise wrong(f"{where}.type", "must be custom: no other tools are run here")
    known(value, {"type", "name", "description", "input_schema", "strict", *_HINTS}, where)
    function = {"name": value.get("name"), "description": value.get("description")}
    return {
        "type": "function",
        "function": {**function, "parameters": value.get("input_schema"), "strict": value.get("strict")},
    }


def _choice(value: dict[str, Any]) -> dict[str, Any]:
    kind = value.get("type")
    modes: dict[Any, Callable[[], Any]] = {
        "auto": lambda: "auto",
        "any": lambda: "required",
        "none": lambda: "none",
        "tool": lambda: {"type": "function", "function": {"name": value.get("name")}},
    }
    if not isinstance(kind, str) or kind not in modes:
        raise wrong("tool_choice.type", "must be auto, any, tool or none")
    known(value, {"type", "disable_parallel_tool_use", *(["name"] if kind == "tool" else []), *_HINTS}, "tool_choice")
    return {"tool_choice": modes[kind](), "parallel_tool_calls": not value.get("disable_parallel_tool_use", False)}


def _format(value: dict[str, Any]) -> dict[str, Any]:
    if unknown := value.keys() - {"format"}:
        raise wrong(f"output_config.{min(unknown)}", "is not supported here")
    form = value.get("format")
    if form is None:
        return {}
    if not isinstance(form, dict) or form.get("type") != "json_schema" or form.keys() - {"type", "schema"}:
        raise wrong("output_config.format", "must be a `type`, json_schema, and a `schema`")
    named = {"name": "answer", "schema": form.get("schema")}
    return {"response_format": {"type": "json_schema", "json_schema": named}}
