"""One call as a model writes it, read as its text comes: JSON, or tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from mball.server.worker.call_syntax import CallSyntax, is_text, properties_of

_MAX_NAME = 256
"""Characters in which a name, and what stands around it, ends."""
_JSON = json.JSONDecoder(parse_constant=lambda name: _no_number(name))

Took = Literal["more", "ended", "none"]
"""What a body says of the text so far: it goes on, it is whole, or it is no call."""


class Body(Protocol):
    """`name` is the function's, once it is known and its arguments begin."""

    name: str | None

    @property
    def raw(self) -> str:
        """What it took."""

    @property
    def arguments(self) -> str:
        """JSON as far as it is there. It only grows."""

    def take(self, text: str) -> tuple[str, Took]:
        """(what is left of the text, what became of it)."""

    def whole(self) -> tuple[str, str] | None:
        """Of one that ended, (the name, the arguments)."""


def body_of(syntax: CallSyntax, tools: Mapping[str, dict[str, Any]]) -> Body:
    """`tools`: names with the schemas of their arguments."""
    if syntax.form == "tagged":
        return _Tagged(tools)
    return _Named(syntax.key) if syntax.form == "named" else _Object(syntax.key, syntax.lead)


class _Json:
    """A JSON object as far as it is there. `inner_end`: where the last value in it that is an object or a list ends."""

    def __init__(self) -> None:
        self.raw = ""
        self.inner_end: int | None = None
        self._depth = 0
        self._quoted = self._escaped = False

    def take(self, text: str) -> tuple[str, Took]:
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
                    self.inner_end = len(self.raw) + at + 1
                if self._depth == 0:
                    self.raw += text[: at + 1]
                    return text[at + 1 :], "ended"
        self.raw += text
        return "", "more"


class _Object:
    """With the name and the arguments in it."""

    def __init__(self, key: str, lead: str) -> None:
        self.name: str | None = None
        self._key = key
        self._lead = lead
        self._before = ""
        self._json = _Json()
        self._head = 0

    @property
    def raw(self) -> str:
        return self._before + self._json.raw

    @property
    def arguments(self) -> str:
        return "" if self.name is None else self._json.raw[self._head : self._json.inner_end]

    def take(self, text: str) -> tuple[str, Took]:
        if not self._json.raw:
            start = text.lstrip()
            if self._lead and not start.startswith("{"):
                if self._lead.startswith(start):
                    return text, "more"
                start = start.removeprefix(self._lead).lstrip()
            if not start.startswith("{"):
                return text, "none" if start else "more"
            self._before, text = text[: len(text) - len(start)], start
        left, took = self._json.take(text)
        if self.name is None:
            self._find_name()
        return left, took

    def _find_name(self) -> None:
        """Where it stands first, and an object of arguments begins after it."""
        found = re.match(rf'\{{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"{self._key}"\s*:\s*(?=\{{)', self._json.raw)
        if found is not None:
            self.name, self._head = found[1], found.end()

    def whole(self) -> tuple[str, str] | None:
        call = _parsed(self._json.raw)
        call = call if isinstance(call, dict) else {}
        name, arguments = call.get("name"), call.get(self._key)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)


class _Named:
    """The name, a mark (or none, where it was left out as a control token), and an object of arguments."""

    def __init__(self, mark: str) -> None:
        self.name: str | None = None
        self._mark = mark
        self._before = ""
        self._json = _Json()

    @property
    def raw(self) -> str:
        return self._before + self._json.raw

    @property
    def arguments(self) -> str:
        return self._json.raw

    def take(self, text: str) -> tuple[str, Took]:
        if self.name is None:
            before, brace, rest = text.partition("{")
            if not brace:
                return text, "none" if len(text) > _MAX_NAME or not _begins_name(text) else "more"
            found = re.fullmatch(r"\s*([\w.-]+)\s*(\[\w+\][^{]*)?", before)
            if found is None:
                return text, "none"
            self.name, self._before, text = found[1], before, brace + rest
        return self._json.take(text)

    def whole(self) -> tuple[str, str] | None:
        return None if self.name is None else (self.name, self.arguments)


class _Tagged:
    """`<function=NAME>`, `<parameter=NAME>` with a value, and their ends. A value is JSON unless its schema says that
    it is a string; each is there once it is whole."""

    _TAGS = ("<parameter=", "</function>")
    _END = "</parameter>"

    def __init__(self, tools: Mapping[str, dict[str, Any]]) -> None:
        self.raw = ""
        self.name: str | None = None
        self.arguments = ""
        self._tools = tools
        self._schemas: dict[str, Any] = {}

    def take(self, text: str) -> tuple[str, Took]:
        if self.name is None:
            found = re.match(r"\s*<function=([^<>\s]+)>", text)
            if found is None:
                return text, "more" if _may_become(text, "<function=") and len(text) < _MAX_NAME else "none"
            self.name, self.arguments = found[1], "{"
            self._schemas = properties_of(self._tools.get(self.name, {}))
            text = self._taken(text, found.end())
        while True:
            # What stands between two tags is none of it.
            tag = text.find("<")
            text = self._taken(text, len(text) if tag < 0 else tag)
            if text.startswith(self._TAGS[1]):
                self.arguments += "}"
                return self._taken(text, len(self._TAGS[1])), "ended"
            if text.startswith(self._TAGS[0]):
                end = text.find(self._END)
                if end < 0:
                    return text, "more"
                self._add(text[len(self._TAGS[0]) : end])
                text = self._taken(text, end + len(self._END))
            elif any(name.startswith(text) for name in self._TAGS):
                return text, "more"
            else:
                text = self._taken(text, 1)

    def _taken(self, text: str, count: int) -> str:
        self.raw += text[:count]
        return text[count:]

    def _add(self, given: str) -> None:
        name, _, value = given.partition(">")
        value = value.removeprefix("\n").removesuffix("\n")
        found: Any = value
        if not is_text(self._schemas.get(name)):
            parsed = _parsed(value)
            found = value if parsed is _NOTHING else parsed
        comma = "" if self.arguments == "{" else ", "
        self.arguments += f"{comma}{json.dumps(name, ensure_ascii=False)}: {json.dumps(found, ensure_ascii=False)}"

    def whole(self) -> tuple[str, str] | None:
        return None if self.name is None else (self.name, self.arguments)


def _begins_name(text: str) -> bool:
    return re.fullmatch(r"\s*([\w.-]+\s*(\[.*)?)?", text, re.DOTALL) is not None


def _may_become(text: str, tag: str) -> bool:
    start = text.lstrip()
    return tag.startswith(start) or (start.startswith(tag) and re.fullmatch(r"[^<>\s]*", start[len(tag) :]) is not None)


_NOTHING = object()


def _parsed(text: str) -> Any:
    """JSON, or _NOTHING."""
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
