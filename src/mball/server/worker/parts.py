"""Texts in parts, as Anthropic's messages and OpenAI's responses have them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mball.errors import InvalidRequest
from mball.server.worker.values import wrong


def text_of(value: Any, where: str, *, kinds: Collection[str], hints: Collection[str]) -> str:
    """Of a text, or of parts of these kinds. `hints` say nothing of the text. Raises InvalidRequest."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(where, "must be a text or a list of parts")
    texts = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise no_such(kind, at)
        known(part, {"type", "text", *hints}, at)
        if not isinstance(part.get("text"), str):
            raise wrong(f"{at}.text", "must be a text")
        texts.append(part["text"])
    return "\n".join(texts)


def no_such(kind: Any, where: str) -> InvalidRequest:
    """Of a part that is none of those that are taken."""
    shown = kind[:40] if isinstance(kind, str) else None
    return wrong(where, f"is of type {shown!r}: text and tools alone are taken, and no address is fetched")


def known(value: dict[str, Any], names: Collection[str], where: str) -> None:
    """Raises InvalidRequest for a field of another name."""
    if unknown := value.keys() - set(names):
        raise wrong(f"{where}.{min(unknown)}", "is not known")
