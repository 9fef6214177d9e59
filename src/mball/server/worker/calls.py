"""Calls of tools in a model's text, found as it comes."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mball.server.worker.call_bodies import Body, body_of
from mball.server.worker.call_syntax import CallSyntax


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

    def __init__(self, syntax: CallSyntax, tools: Mapping[str, dict[str, Any]], most: int | None = None) -> None:
        """`tools`: names with the schemas of their arguments."""
        self._syntax = syntax
        self._tools = tools
        self._most = most
        self._left = ""
        self._state: Literal["text", "call", "after"] = "text" if syntax.begin else "call"
        self._number = 0
        # Since a call: blanks between two, or after the last, are none of the answer's own text.
        self._quiet = False
        self._begun(first=True)

    def _begun(self, *, first: bool) -> None:
        """`given`: so many characters of the body's arguments went out; None: not even its name did."""
        self._body: Body = body_of(self._syntax, self._tools)
        self._given: int | None = None
        self._mark = self._syntax.begin if first else ""

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
        if end and self._state == "call" and self._given is None:
            self._say(self._mark + self._body.raw + self._left, pieces)
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
        if self._quiet and not said.strip():
            if not found and not end:
                return False
            said = ""
        self._left = rest
        self._say(said, pieces)
        if found:
            self._state = "call"
        return bool(found)

    def _say(self, text: str, pieces: list[Piece]) -> None:
        self._quiet = self._quiet and not text.strip()
        if not self._full:
            pieces.append(text)

    def _call(self, pieces: list[Piece], end: bool) -> bool:
        before = len(self._left)
        self._left, took = self._body.take(self._left)
        if took == "none":
            self._say(self._mark, pieces)
            self._begun(first=True)
            self._state = "text"
            return True
        self._arguments(pieces)
        if took == "ended":
            self._whole(pieces)
        return took == "ended" or len(self._left) < before

    def _after(self, pieces: list[Piece], end: bool) -> bool:
        last, between = self._syntax.end, self._syntax.between
        self._left = self._left.lstrip(between + string.whitespace) if between else self._left.lstrip()
        if not self._left:
            return False
        if between and self._left.startswith("{"):
            self._begun(first=False)
            self._state = "call"
            return True
        if last and self._left.startswith(last):
            self._left = self._left.removeprefix(last)
        elif last.startswith(self._left) and not end:
            return False
        self._begun(first=True)
        self._state = "text"
        self._quiet = True
        return True

    def _arguments(self, pieces: list[Piece]) -> None:
        body = self._body
        if self._given is None:
            if body.name is None or body.name not in self._tools or self._full:
                return
            self._given = 0
            pieces.append(self._open(body.name))
        if new := body.arguments[self._given :]:
            pieces.append(CallPiece(self._number - 1, new))
            self._given += len(new)

    def _whole(self, pieces: list[Piece]) -> None:
        self._state = "after"
        if self._given is not None or self._full:
            return
        name, arguments = self._body.whole() or ("", "")
        if name in self._tools:
            pieces += [self._open(name), CallPiece(self._number - 1, arguments)]
            return
        self._say(self._mark + self._body.raw, pieces)
        self._begun(first=True)
        self._state = "text"

    def _open(self, name: str) -> CallPiece:
        self._number += 1
        length = self._syntax.id_length
        call_id = f"call_{secrets.token_hex(12)}" if length is None else secrets.token_hex(length)[:length]
        return CallPiece(self._number - 1, "", call_id, name)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the text's end may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
