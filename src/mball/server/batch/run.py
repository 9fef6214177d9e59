"""Works a batch off against a server, over HTTP."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import aiohttp

from mball.server.batch import lines
from mball.server.batch.answers import Answers, failures
from mball.server.batch.lines import Request
from mball.server.batch.work import NoAnswer, Progress, Reply, Tally, Work
from mball.server.client import ServerUnreachable, key_headers

__all__ = ["Tally", "run_batch"]

_CONNECT_TIMEOUT_S = 10.0


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
    that the server refused or that failed `attempts` times. Raises ConfigError for files that cannot be used,
    ServerUnreachable, and NotWritten; what was answered by then is kept and not asked again.
    """
    with Answers(target) as answers, failures(errors) as failed:
        index = await asyncio.to_thread(lines.index, source, answers.finished)
        tally = Tally(total=index.total, skipped=index.skipped, bad=len(index.bad))
        if index.bad:
            await asyncio.to_thread(failed.append, [_bad(*bad) for bad in index.bad])
        progress(tally)
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=None, sock_connect=_CONNECT_TIMEOUT_S)
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            connector = aiohttp.TCPConnector(limit=0)  # the batch's own concurrency is the bound
            async with aiohttp.ClientSession(
                url, headers=key_headers(), timeout=timeout, connector=connector
            ) as session:
                ask = _Server(session, url).ask
                work = Work(ask, descriptor, answers, failed, tally, attempts=attempts, progress=progress)
                await work.run(index, concurrency)
        finally:
            os.close(descriptor)
    return tally


def _bad(number: int, custom_id: str | None, reason: str) -> dict[str, object]:
    return lines.answer(custom_id, error={"code": "invalid_line", "message": f"line {number}: {reason}"})


class _Server:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def ask(self, request: Request) -> Reply:
        try:
            async with self._session.post(request.url, json=request.body) as response:
                headers = response.headers
                return Reply(
                    response.status,
                    await response.read(),
                    retry_after=headers.get("Retry-After"),
                    request_id=headers.get("x-request-id", ""),
                )
        except TimeoutError:
            raise NoAnswer("no whole answer in time", code="timeout", again=False) from None
        except aiohttp.ClientConnectorError as error:
            way_out = "start it with `mball serve`, or name --url or --config"
            raise ServerUnreachable(f"no answer from {self._url} ({error}); {way_out}") from None
        except aiohttp.ClientError as error:
            raise NoAnswer(str(error) or repr(error), code="connection", again=True) from None
