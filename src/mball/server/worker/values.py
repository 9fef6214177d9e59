"""What readers of requests share."""

from __future__ import annotations

from typing import Any

from mball.errors import InvalidRequest

MAX_DEPTH = 64


def wrong(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` {what}", param=param)


def shallow(value: Any, param: str) -> None:
    """Raises InvalidRequest for JSON that is nested deeper than MAX_DEPTH, or holds half of a surrogate pair."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, str):
                encodable(entry, param)
            elif isinstance(entry, dict):
                below += [*entry.keys(), *entry.values()]
            elif isinstance(entry, list):
                below += entry
        if not below:
            return
        level = below
    raise wrong(param, f"is nested deeper than {MAX_DEPTH}")


def encodable(text: str, where: str) -> str:
    """The text itself. JSON can write half a surrogate pair, which is no character: InvalidRequest."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"`{where}` holds half of a surrogate pair", param=where) from None
    return text
