"""The files of a batch: requests in, answers and errors out, one JSON object a line
(https://platform.openai.com/docs/guides/batch)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mball.errors import ConfigError, MballError

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})


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
    def places(self) -> list[Place]:
        return [place for places in self.by_model.values() for place in places]


def parse(line: bytes) -> Request:
    """Raises BadLine."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise BadLine(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadLine("not a JSON object")
    custom_id, url, body = data.get("custom_id"), data.get("url"), data.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("custom_id must be a text that is not empty")
    if data.get("method") != "POST":
        raise BadLine(f"method must be POST, not {data.get('method')!r}")
    if url not in ENDPOINTS:
        raise BadLine(f"url must be one of {', '.join(sorted(ENDPOINTS))}, not {url!r}")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise BadLine("body must be an object that names its model")
    if body.get("stream"):
        raise BadLine("an answer in a batch cannot be streamed: leave `stream` out")
    return Request(custom_id, url, body["model"], body)


def index(path: Path, finished: set[str]) -> Index:
    """Reads the input once, keeping no bodies. Raises ConfigError where it cannot be read."""
    found, seen, offset = Index(), set[str](), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    request = parse(line)
                except BadLine as error:
                    found.bad.append((number, None, str(error)))
                    continue
                if request.custom_id in seen:
                    found.bad.append((number, request.custom_id, "an earlier line has the same custom_id"))
                    continue
                seen.add(request.custom_id)
                if request.custom_id in finished:
                    found.skipped += 1
                    continue
                place = Place(request.custom_id, start, len(line))
                found.by_model.setdefault(request.model, []).append(place)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
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


class Answers:
    """The output: lines are appended, each on the disk before it counts. One process writes it at a time."""

    def __init__(self, path: Path) -> None:
        """Opens it, cutting off a line that a crash left half. Raises ConfigError."""
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{path}: another batch is writing it; wait, or name another output") from None
        self.finished = self._read(path)

    def _read(self, path: Path) -> set[str]:
        finished, whole = set[str](), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    finished.add(json.loads(line)["custom_id"])
                except (ValueError, KeyError, TypeError):
                    self._file.close()
                    raise ConfigError(f"{path}: line {number} is no answer of a batch; name another output") from None
        self._file.truncate(whole)
        return finished

    def append(self, line: dict[str, Any]) -> None:
        """Blocks until the line is on the disk."""
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        os.fsync(self._file.fileno())

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def failures(path: Path) -> Iterator[Answers]:
    """A file of this run's failures alone; none is left where there were none."""
    path.unlink(missing_ok=True)
    with Answers(path) as file:
        try:
            yield file
        finally:
            if not path.stat().st_size:
                path.unlink()
