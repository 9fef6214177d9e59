"""Chat messages as text: parts joined, and everything that is not text refused by name (no address is ever fetched)."""

from __future__ import annotations

from typing import Any

from mball.errors import InvalidRequest

ChatMessage = dict[str, str]
"""`role`, `content`, and `name` where one was given: what a chat template gets."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_IGNORED = {"refusal", "annotations", "reasoning_content"}
_UNSUPPORTED = {"tool_calls", "function_call", "audio", "tool_call_id"}
_MAX_NAME = 64


def read_messages(value: Any) -> list[ChatMessage]:
    """Raises InvalidRequest naming the message and the field."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("`messages` must be a list of at least one message", param="messages")
    return [_message(entry, f"messages[{index}]") for index, entry in enumerate(value)]


def _message(value: Any, where: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{where}` must be an object", param=where)
    role = value.get("role")
    if role in ("tool", "function"):
        raise InvalidRequest(f"`{where}.role`: tools are not supported here", param=f"{where}.role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"`{where}.role` must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    message = {"role": _ROLES[role], "content": _content(value.get("content"), role, f"{where}.content")}
    for field, given in value.items():
        if field in ("role", "content") or field in _IGNORED or given is None or given == []:
            continue
        param = f"{where}.{field}"
        if field in _UNSUPPORTED:
            raise InvalidRequest(f"`{param}` is not supported here", param=param, code="unsupported_parameter")
        if field != "name":
            raise InvalidRequest(f"Unrecognized request argument supplied: {param}", param=param)
        if not isinstance(given, str) or not 0 < len(given) <= _MAX_NAME:
            raise InvalidRequest(f"`{param}` must be a text of at most {_MAX_NAME} characters", param=param)
        message["name"] = encodable(given, param)
    return message


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


def encodable(text: str, where: str) -> str:
    """The text itself. JSON can write half a surrogate pair, which is no character: InvalidRequest."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"`{where}` holds half of a surrogate pair", param=where) from None
    return text
