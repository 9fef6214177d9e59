"""Calls of tools in a model's text, found as it comes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mball.server.worker.tools import CallSyntax


@dataclass(slots=True)
class CallPiece:
    """What is new of an answer's call number `index`; its first piece has `id` and `name`."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Piece = str | CallPiece
"""A text is the answer's own."""


class CallReader:
    """One answer. Arguments that follow their call's name go out as they come, others once the call is whole.

    What is no call of a known tool is text. After `most` calls nothing more is given out.
    """

    def __init__(self, syntax: CallSyntax, names: Collection[str], most: int | None = None) -> None:
        self._syntax = syntax
        self._names = names
        self._most = most
        self._left = ""
        self._state: Literal["text", "call", "after"] = "text" if syntax.begin else "call"
        self._number = 0
        self._object = _Object(syntax.key)

    @property
    def called(self) -> bool:
        return self._number > 0

    def add(self, text: str, *, end: bool = False) -> list[Piece]:
        """`end`: the answer is whole."""
        self._left += text
        pieces: list[Piece] = []
        step = {"text": self._text, "call": self._call, "after": self._after}
        while self._left and step[self._state](pieces, end):
            pass
        if end and self._state == "call" and self._object.given is None:
            pieces.append(self._syntax.begin + self._object.raw + self._left)
        return [piece for piece in pieces if piece]

    @property
    def _full(self) -> bool:
        return self._most is not None and self._number >= self._most

    # Each step takes from what is left; False: it needs more of it.

    def _text(self, pieces: list[Piece], end: bool) -> bool:
        begin = self._syntax.begin
        said, found, rest = self._left.partition(begin) if begin else (self._left, "", "")
        if not found and not end:
            held = _overlap(said, begin)
            said, rest = said[: len(said) - held], said[len(said) - held :]
        if self.called and not said.strip():
            # Between two calls, or after the last.
            if not found and not end:
                return False
            said = ""
        self._left = rest
        if not self._full:
            pieces.append(said)
        if found:
            self._state = "call"
        return bool(found)

    def _call(self, pieces: list[Piece], end: bool) -> bool:
        if not self._object.raw:
            start = self._left.lstrip()
            lead = self._syntax.lead
            if lead and not start.startswith("{"):
                if lead.startswith(start) and not end:
                    return False
                start = start.removeprefix(lead).lstrip()
            if not start:
                return False
            if not start.startswith("{"):
                self._left, self._state = self._syntax.begin + self._left, "text"
                return not self._syntax.begin or self._give(pieces)
            self._left = start
        self._left, ended = self._object.take(self._left)
        self._arguments(pieces)
        if ended:
            self._whole(pieces)
        return ended

    def _give(self, pieces: list[Piece]) -> bool:
        """What began as a call and is none."""
        if not self._full:
            pieces.append(self._left)
        self._left = ""
        return False

    def _after(self, pieces: list[Piece], end: bool) -> bool:
        begin, last = self._syntax.begin, self._syntax.end
        self._left = self._left.lstrip() if begin else self._left.lstrip("; \n")
        if last and self._left.startswith(last):
            self._left = self._left.removeprefix(last)
        elif last.startswith(self._left) and not end:
            return False
        self._state = "call" if not begin and self._left.startswith("{") else "text"
        return True

    def _arguments(self, pieces: list[Piece]) -> None:
        found = self._object
        if found.given is None:
            name = found.name()
            if name is None or name not in self._names or self._full:
                return
            found.given = found.head
            pieces.append(self._open(name))
        if new := found.value_from(found.given):
            pieces.append(CallPiece(self._number - 1, new))
            found.given += len(new)

    def _whole(self, pieces: list[Piece]) -> None:
        found, self._object, self._state = self._object, _Object(self._syntax.key), "after"
        if found.given is not None or self._full:
            return
        call = _parsed(found.raw)
        name, arguments = call.get("name"), call.get(self._syntax.key)
        if isinstance(name, str) and name in self._names and isinstance(arguments, dict):
            pieces.append(self._open(name))
            pieces.append(CallPiece(self._number - 1, json.dumps(arguments, ensure_ascii=False)))
            return
        pieces.append(self._syntax.begin + found.raw)
        self._state = "text"

    def _open(self, name: str) -> CallPiece:
        self._number += 1
        return CallPiece(self._number - 1, "", f"call_{secrets.token_hex(12)}", name)


class _Object:
    """A JSON object as far as it is there. `given`: up to there its arguments went out."""

    def __init__(self, key: str) -> None:
        self.raw = ""
        self.head = 0
        self.given: int | None = None
        self._key = key
        self._depth = 0
        self._quoted = self._escaped = False
        self._value_end: int | None = None

    def take(self, text: str) -> tuple[str, bool]:
        """(what follows the object, whether it ended)."""
        for at, character in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self._value_end = len(self.raw) + at + 1
                if self._depth == 0:
                    self.raw += text[: at + 1]
                    return text[at + 1 :], True
        self.raw += text
        return "", False

    def name(self) -> str | None:
        """Where it stands first, and an object of arguments begins after it, at `head`."""
        found = re.match(rf'\{{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"{self._key}"\s*:\s*(?=\{{)', self.raw)
        if found is None:
            return None
        self.head = found.end()
        return found[1]

    def value_from(self, start: int) -> str:
        """Of the arguments what is there from `start` on."""
        return self.raw[start : self._value_end]


def _overlap(text: str, mark: str) -> int:
    """How many characters at the text's end may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _parsed(raw: str) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
