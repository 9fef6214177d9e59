"""Chat messages as a chat template gets them: parts of text joined, calls of tools with their arguments read, and
everything else refused by name (no address is ever fetched)."""

from __future__ import annotations

import json
from typing import Any

from mball.errors import InvalidRequest
from mball.server.worker.schemas import check_name
from mball.server.worker.values import encodable, shallow, wrong

ChatMessage = dict[str, Any]
"""`role`, `content`, and where they were given `name`, `tool_calls`, `tool_call_id`: what a chat template gets."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_IGNORED = {"refusal", "annotations", "reasoning_content"}
_UNSUPPORTED = {"function_call", "audio"}
_OF_ROLE = {"tool_calls": "assistant", "tool_call_id": "tool"}
_MAX_NAME = 64
_MAX_CALLS = 128


def read_messages(value: Any) -> list[ChatMessage]:
    """Raises InvalidRequest naming the message and the field."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("`messages` must be a list of at least one message", param="messages")
    return [_message(entry, f"messages[{index}]") for index, entry in enumerate(value)]


def _message(value: Any, where: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{where}` must be an object", param=where)
    role = value.get("role")
    if role == "function":
        raise InvalidRequest(f"`{where}.role`: functions are now called tools", param=f"{where}.role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"`{where}.role` must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    message: ChatMessage = {"role": _ROLES[role], "content": _content(value.get("content"), role, f"{where}.content")}
    for field, given in value.items():
        if field in ("role", "content") or field in _IGNORED or given is None or given == []:
            continue
        param = f"{where}.{field}"
        if field in _UNSUPPORTED:
            raise InvalidRequest(f"`{param}` is not supported here", param=param, code="unsupported_parameter")
        if _OF_ROLE.get(field) == role:
            message[field] = _calls(given, param) if field == "tool_calls" else _id(given, param)
            continue
        if field != "name":
            raise InvalidRequest(f"Unrecognized request argument supplied: {param}", param=param)
        if not isinstance(given, str) or not 0 < len(given) <= _MAX_NAME:
            raise InvalidRequest(f"`{param}` must be a text of at most {_MAX_NAME} characters", param=param)
        message["name"] = encodable(given, param)
    if role == "tool" and "tool_call_id" not in message:
        raise wrong(f"{where}.tool_call_id", "must be there: the id of the call that this answers")
    return message


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        raise wrong(where, f"must be a text of at most {_MAX_NAME} characters")
    return encodable(value, where)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Their arguments as objects, which is what templates write as JSON."""
    if not isinstance(value, list) or len(value) > _MAX_CALLS:
        raise wrong(where, f"must be a list of at most {_MAX_CALLS} calls")
    return [_call(entry, f"{where}[{index}]") for index, entry in enumerate(value)]


def _call(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type", "function") != "function":
        raise wrong(where, "must be a call of type `function`")
    if unknown := (value.keys() - {"id", "type", "function", "index"}) | (function.keys() - {"name", "arguments"}):
        raise wrong(f"{where}.{min(unknown)}", "is not known")
    name = check_name(function.get("name"), f"{where}.function.name")
    arguments = read_arguments(function.get("arguments"), f"{where}.function.arguments")
    call = {"name": name, "arguments": arguments}
    return {"id": _id(value.get("id"), f"{where}.id"), "type": "function", "function": call}


def read_arguments(value: Any, where: str) -> dict[str, Any]:
    """Of JSON. Raises InvalidRequest."""
    try:
        arguments = json.loads(value or "{}") if isinstance(value, str) else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong(where, "must be a JSON object in a text")
    shallow(arguments, where)
    return arguments


def _content(value: Any, role: str, where: str) -> str:
    if isinstance(value, str):
        return encodable(value, where)
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"`{where}` must be a text or a list of text parts", param=where)
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        kind = kind[:40] if isinstance(kind, str) else None
        raise InvalidRequest(
            f"`{where}`: content of type {kind!r} is not supported: text alone, and no address is fetched", param=where
        )
    text = value.get("text")
    if not isinstance(text, str) or value.keys() - {"type", "text"}:
        raise InvalidRequest(f"`{where}` must have `type` and a `text`, nothing else", param=where)
    return encodable(text, where)
