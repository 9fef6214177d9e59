"""Works an index of requests off: model by model, so many at once, each answer kept before it counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from mball.errors import MballError
from mball.server.batch import lines
from mball.server.batch.answers import Answers, NotWritten
from mball.server.batch.lines import BadLine, Index, Place, Request
from mball.server.client import ServerUnreachable
from mball.server.threads import whole

_BUSY = frozenset({429, 502, 503, 504})
_MAX_BACKOFF_S = 30.0


@dataclass(slots=True)
class Tally:
    """How far a batch is. `skipped` were answered by an earlier run, `bad` are lines that are no requests."""

    total: int
    skipped: int
    bad: int
    done: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request over HTTP. `retry_after` is the header's value."""

    status: int
    content: bytes
    retry_after: str | None = None
    request_id: str = ""


class NoAnswer(MballError):
    """Nothing came of a request; `code` stands in the line of the error file. `again`: trying again may help."""

    def __init__(self, message: str, *, code: str, again: bool) -> None:
        super().__init__(message)
        self.code = code
        self.again = again


Ask = Callable[[Request], Awaitable[Reply]]
"""Raises NoAnswer, and ServerUnreachable, which ends the batch once it came `attempts` times."""
Progress = Callable[[Tally], None]


class Work:
    """One run over what an index says is to be asked."""

    def __init__(
        self,
        ask: Ask,
        descriptor: int,
        answers: Answers,
        failures: Answers,
        tally: Tally,
        *,
        attempts: int,
        progress: Progress,
    ) -> None:
        """`descriptor` is the input's."""
        self._ask = ask
        self._descriptor = descriptor
        self._files = {True: answers, False: failures}
        self._tally = tally
        self._attempts = attempts
        self._progress = progress
        self._unwritten: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        self._writing = asyncio.Lock()
        self._started = time.monotonic()

    async def run(self, index: Index, concurrency: int) -> None:
        """So many requests at once. A model's last answer is there before the next model is asked for: no request of
        the one has the other brought back. Raises NotWritten, ServerUnreachable."""
        try:
            for places in index.by_model.values():
                rest = iter(places)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(places))):
                        group.create_task(self._each(rest))
        except* MballError as failed:
            _raise_first(failed)

    async def _each(self, places: Iterator[Place]) -> None:
        for place in places:
            await self._one(place)

    async def _one(self, place: Place) -> None:
        try:
            request = lines.read(self._descriptor, place)
        except BadLine as error:
            failed = {"code": "invalid_line", "message": str(error)}
            await self._keep(lines.answer(place.custom_id, error=failed), None)
            return
        line = await self._answer(request)
        await self._keep(line, line["response"] and line["response"]["body"])

    async def _answer(self, request: Request) -> dict[str, Any]:
        """The request's line of output. Raises ServerUnreachable where no attempt got an answer."""
        attempt = 1
        while True:
            last = attempt == self._attempts
            wait_s = backoff_s(None, attempt)
            try:
                reply = await self._ask(request)
                if last or reply.status not in _BUSY:
                    return _line(request, reply)
                wait_s = backoff_s(reply.retry_after, attempt)
            except NoAnswer as error:
                if last or not error.again:
                    return lines.answer(request.custom_id, error={"code": error.code, "message": str(error)})
            except ServerUnreachable:
                if last:
                    raise
            await asyncio.sleep(wait_s)
            attempt += 1

    async def _keep(self, line: dict[str, Any], body: Any) -> None:
        """Those that came while others were written go to the disk together."""
        fine = line["error"] is None
        self._unwritten[fine].append(line)
        async with self._writing:
            together, self._unwritten[fine] = self._unwritten[fine], []
            try:
                if together:
                    await whole(self._files[fine].append, together)
            except NotWritten:
                # Whoever has the lock next has lines among them.
                self._unwritten[fine] = together + self._unwritten[fine]
                raise
        self._tally.done += 1
        self._tally.failed += not fine
        self._tally.tokens += _tokens(body)
        self._tally.seconds = time.monotonic() - self._started
        self._progress(self._tally)


def _raise_first(group: BaseExceptionGroup[MballError]) -> NoReturn:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    raise error from None


def _line(request: Request, reply: Reply) -> dict[str, Any]:
    try:
        body: Any = json.loads(reply.content)
    except ValueError:
        body = None
    given = {"status": reply.status, "request_id": reply.request_id, "body": body}
    if reply.status == 200 and isinstance(body, dict):
        return lines.answer(request.custom_id, **given)
    told = body.get("error") if isinstance(body, dict) else None
    error = {"code": f"http_{reply.status}", "message": f"HTTP {reply.status}"}
    if isinstance(told, dict):
        error = {"code": told.get("code") or error["code"], "message": told.get("message") or error["message"]}
    return lines.answer(request.custom_id, **given, error=error)


def backoff_s(header: str | None, attempt: int) -> float:
    """How long to wait after the n-th attempt, where a Retry-After does not say it."""
    try:
        wanted = float(header) if header else 0.25 * 2**attempt
    except ValueError:
        wanted = 0.25 * 2**attempt
    return min(max(wanted, 0.0), _MAX_BACKOFF_S)


def _tokens(body: Any) -> int:
    """Those that were generated; for embeddings those that were read."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0
    for name in ("completion_tokens", "output_tokens", "total_tokens"):
        if isinstance(counted := usage.get(name), int):
            return counted
    return 0
