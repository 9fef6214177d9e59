"""Works a batch off against a server."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from mball.server.batch import lines
from mball.server.batch.lines import Answers, BadLine, Place, Request
from mball.server.client import ServerUnreachable, key_headers

_CONNECT_TIMEOUT_S = 10.0
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


Progress = Callable[[Tally], None]


async def run_batch(
    source: Path,
    target: Path,
    url: str,
    *,
    errors: Path,
    concurrency: int = 16,
    attempts: int = 6,
    timeout_s: float = 3600.0,
    progress: Progress = lambda _: None,
) -> Tally:
    """Asks the server at `url` for every request of `source` that `target` has no answer to.

    Answers are appended to `target` as they come. `errors` is written anew: lines that are no requests, and requests
    that the server refused or that failed `attempts` times. Raises ConfigError for files that cannot be used, and
    ServerUnreachable; what was answered by then is kept and not asked again.
    """
    with Answers(target) as answers, lines.failures(errors) as failures:
        index = await asyncio.to_thread(lines.index, source, answers.finished)
        tally = Tally(total=len(index.places), skipped=index.skipped, bad=len(index.bad))
        for number, custom_id, reason in index.bad:
            error = {"code": "invalid_line", "message": f"line {number}: {reason}"}
            failures.append(lines.answer(custom_id, error=error))
        progress(tally)
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=None, sock_connect=_CONNECT_TIMEOUT_S)
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            connector = aiohttp.TCPConnector(limit=0)  # the workers are the bound
            async with aiohttp.ClientSession(
                url, headers=key_headers(), timeout=timeout, connector=connector
            ) as session:
                batch = _Batch(session, url, descriptor, answers, failures, tally, attempts, progress)
                await batch.work(iter(index.places), concurrency)
        finally:
            os.close(descriptor)
    return tally


class _Batch:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        descriptor: int,
        answers: Answers,
        failures: Answers,
        tally: Tally,
        attempts: int,
        progress: Progress,
    ) -> None:
        self._session = session
        self._url = url
        self._descriptor = descriptor
        self._answers = answers
        self._failures = failures
        self._tally = tally
        self._attempts = attempts
        self._progress = progress
        self._writing = asyncio.Lock()
        self._started = time.monotonic()

    async def work(self, places: Iterator[Place], concurrency: int) -> None:
        """In the order of `places`, so many at once: a model's last requests overlap the next one's first."""

        async def worker() -> None:
            for place in places:
                await self._one(place)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker())
        except* ServerUnreachable as unreachable:
            raise unreachable.exceptions[0] from None

    async def _one(self, place: Place) -> None:
        try:
            request = lines.read(self._descriptor, place)
        except BadLine as error:
            failed = {"code": "invalid_line", "message": str(error)}
            await self._keep(lines.answer(place.custom_id, error=failed), None)
            return
        line = await self._ask(request)
        await self._keep(line, line["response"] and line["response"]["body"])

    async def _ask(self, request: Request) -> dict[str, Any]:
        """The request's line of output. Raises ServerUnreachable where no attempt got an answer."""
        attempt = 1
        while True:
            last = attempt == self._attempts
            wait_s = _backoff_s(None, attempt)
            try:
                async with self._session.post(request.url, json=request.body) as response:
                    if last or response.status not in _BUSY:
                        return _line(request, response, await response.read())
                    wait_s = _backoff_s(response.headers.get("Retry-After"), attempt)
            except TimeoutError:
                return lines.answer(request.custom_id, error={"code": "timeout", "message": "no whole answer in time"})
            except aiohttp.ClientConnectorError as error:
                if last:
                    way_out = "start it with `mball serve`, or name --url or --config"
                    raise ServerUnreachable(f"no answer from {self._url} ({error}); {way_out}") from None
            except aiohttp.ClientError as error:
                if last:
                    return lines.answer(request.custom_id, error={"code": "connection", "message": str(error)})
            await asyncio.sleep(wait_s)
            attempt += 1

    async def _keep(self, line: dict[str, Any], body: Any) -> None:
        fine = line["error"] is None
        async with self._writing:
            await asyncio.to_thread((self._answers if fine else self._failures).append, line)
        self._tally.done += 1
        self._tally.failed += not fine
        self._tally.tokens += _tokens(body)
        self._tally.seconds = time.monotonic() - self._started
        self._progress(self._tally)


def _line(request: Request, response: aiohttp.ClientResponse, content: bytes) -> dict[str, Any]:
    try:
        body: Any = json.loads(content)
    except ValueError:
        body = None
    given = {"status": response.status, "request_id": response.headers.get("x-request-id", ""), "body": body}
    if response.status == 200 and isinstance(body, dict):
        return lines.answer(request.custom_id, **given)
    told = body.get("error") if isinstance(body, dict) else None
    error = {"code": f"http_{response.status}", "message": f"HTTP {response.status}"}
    if isinstance(told, dict):
        error = {"code": told.get("code") or error["code"], "message": told.get("message") or error["message"]}
    return lines.answer(request.custom_id, **given, error=error)


def _backoff_s(header: str | None, attempt: int) -> float:
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
    counted = usage.get("completion_tokens", usage.get("total_tokens", 0))
    return counted if isinstance(counted, int) else 0
