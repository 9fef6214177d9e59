"""The lines of a batch: requests in, answers and errors out, one JSON object a line
(https://platform.openai.com/docs/guides/batch)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mball.errors import ConfigError, InvalidRequest, MballError
from mball.server.http import parse_object

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"})


class BadLine(MballError):
    """A line is no request."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input."""

    custom_id: str
    url: str
    model: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request's line stands in the input."""

    custom_id: str
    offset: int
    length: int


@dataclass(slots=True)
class Index:
    """What of the input is to be asked: its places by model, so that each model is brought in once.

    `bad` holds (line number, custom_id or None, reason).
    """

    by_model: dict[str, list[Place]] = field(default_factory=dict)
    bad: list[tuple[int, str | None, str]] = field(default_factory=list)
    skipped: int = 0

    @property
    def total(self) -> int:
        return sum(len(places) for places in self.by_model.values())


def parse(line: bytes) -> Request:
    """Raises BadLine."""
    try:
        data = parse_object(line)
    except InvalidRequest as error:
        raise BadLine(str(error).replace("the body", "the line")) from None
    custom_id, url, body = data.get("custom_id"), data.get("url"), data.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("custom_id must be a text that is not empty")
    if data.get("method") != "POST":
        raise BadLine(f"method must be POST, not {data.get('method')!r}")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise BadLine(f"url must be one of {', '.join(sorted(ENDPOINTS))}, not {url!r}")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise BadLine("body must be an object that names its model")
    if body.get("stream"):
        raise BadLine("an answer in a batch cannot be streamed: leave `stream` out")
    return Request(custom_id, url, body["model"], body)


@dataclass(frozen=True, slots=True)
class Line:
    """What stands in a line of the input: a request, or why it is none."""

    number: int
    offset: int
    length: int
    request: Request | BadLine
    custom_id: str | None = None


def scan(path: Path) -> Iterator[Line]:
    """The lines that are not empty. Raises ConfigError where the file cannot be read."""
    seen, offset = set[str](), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    request = parse(line)
                except BadLine as error:
                    yield Line(number, start, len(line), error)
                    continue
                if request.custom_id in seen:
                    double = BadLine("an earlier line has the same custom_id")
                    yield Line(number, start, len(line), double, request.custom_id)
                    continue
                seen.add(request.custom_id)
                yield Line(number, start, len(line), request, request.custom_id)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def index(path: Path, finished: set[str]) -> Index:
    """Reads the input once, keeping no bodies. Raises ConfigError where it cannot be read."""
    found = Index()
    for line in scan(path):
        if isinstance(line.request, BadLine):
            found.bad.append((line.number, line.custom_id, str(line.request)))
            continue
        # The order of models is the whole input's: one that an earlier run was at comes first again.
        places = found.by_model.setdefault(line.request.model, [])
        if line.request.custom_id in finished:
            found.skipped += 1
        else:
            places.append(Place(line.request.custom_id, line.offset, line.length))
    return found


def read(descriptor: int, place: Place) -> Request:
    """The request at a place. Raises BadLine where the file was changed since it was indexed."""
    request = parse(os.pread(descriptor, place.length, place.offset))
    if request.custom_id != place.custom_id:
        raise BadLine("the input was changed while it was worked on")
    return request


def answer(
    custom_id: str | None,
    *,
    status: int | None = None,
    request_id: str = "",
    body: Any = None,
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A line of output. `response` is null where there was none."""
    response = None if status is None else {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
