"""Carries batches out: each a task, one of an owner at a time; what a crash interrupts goes on at the next start."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from mball.errors import InvalidRequest, MballError, NotFound, StorageFailed, StorageLimit
from mball.server.batch import lines
from mball.server.batch.answers import Answers, NotWritten
from mball.server.batch.lines import Index, Request
from mball.server.batch.work import Ask, Reply, Tally, Work
from mball.server.gateway.batches_ask import Gateway
from mball.server.gateway.batches_check import defects
from mball.server.gateway.batches_figures import usage_in
from mball.server.gateway.batches_store import Batch, Batches
from mball.server.gateway.files_store import File, Files, owner_of
from mball.server.threads import whole

_ATTEMPTS = 6
_AGAIN_S = 15.0
"""After how long a batch looks whether the disk has room again."""
_log = structlog.get_logger(__name__)


class Runner:
    """`begin` with a batch that has no end yet. Whatever happens to the disk, a batch waits for it until it expires."""

    def __init__(
        self, files: Files, batches: Batches, gateway: Gateway, *, max_requests: int, concurrency: int
    ) -> None:
        self._files = files
        self._batches = batches
        self._gateway = gateway
        self._max_requests = max_requests
        self._concurrency = concurrency
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._works: dict[str, asyncio.Task[None]] = {}

    def begin(self, batch: Batch) -> None:
        # It is not the work of the request that asked for it, as far as the log goes.
        context = contextvars.Context()
        life = asyncio.create_task(self._live(owner_of(batch.key_name), batch.id), name=batch.id, context=context)
        self._lives[batch.id] = life
        life.add_done_callback(self._ended)

    def _ended(self, life: asyncio.Task[None]) -> None:
        self._lives.pop(life.get_name(), None)
        if not life.cancelled() and (error := life.exception()) is not None:
            _log.error("a batch broke off; it goes on at the next start", batch=life.get_name(), error=repr(error))

    async def close(self) -> None:
        """What is under way stops where it is, and goes on at the next start."""
        lives = list(self._lives.values())
        for life in lives:
            life.cancel()
        if lives:
            await asyncio.wait(lives)

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Raises NotFound, InvalidRequest where it has ended or is about to, StorageFailed."""

        def to(batch: Batch) -> Batch:
            if batch.status == "cancelling":
                return batch
            if batch.status not in ("validating", "in_progress"):
                raise InvalidRequest(f"a batch that is {batch.status} can't be cancelled", param="batch_id")
            return batch.to("cancelling")

        batch = await self._batches.change(owner, batch_id, to)
        if (work := self._works.get(batch_id)) is not None:
            work.cancel()
        return batch

    async def _live(self, owner: str, batch_id: str) -> None:
        while True:
            try:
                await self._carry_out(owner, batch_id)
                return
            except (StorageFailed, StorageLimit, NotWritten, OSError) as error:
                _log.warning("a batch waits for room", batch=batch_id, error=str(error))
            except MballError as error:
                _log.warning("a batch broke off", batch=batch_id, error=str(error))
                why = {"code": "failed", "message": str(error), "param": None, "line": None}
                await self._end(owner, self._batches.get(owner, batch_id), "failed", errors=[why])
                return
            await asyncio.sleep(_AGAIN_S)

    async def _carry_out(self, owner: str, batch_id: str) -> None:
        batch = self._batches.get(owner, batch_id)
        expired = False
        if batch.status in ("validating", "in_progress"):
            work = self._works[batch_id] = asyncio.create_task(self._work(owner, batch), name=f"work of {batch_id}")
            try:
                await asyncio.wait({work}, timeout=max(0.0, batch.expires_at - time.time()))
                expired = not work.done()
            finally:
                self._works.pop(batch_id, None)
                work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                work.result()
            batch = self._batches.get(owner, batch_id)
        if batch.ended:
            return
        if batch.status == "cancelling":
            await self._end(owner, batch, "cancelled")
        elif expired:
            await self._expire(owner, batch)
            await self._end(owner, batch, "expired")
        else:
            await self._batches.change(owner, batch_id, lambda batch: batch.to("finalizing"))
            await self._end(owner, batch, "completed")

    async def _work(self, owner: str, batch: Batch) -> None:
        """What may be broken off: by its owner, by its expiry, by the server's end."""
        if batch.status == "validating":
            path, serves = self._files.path(owner, batch.input_file_id), self._gateway.serves(batch.key_name)
            try:
                total, errors = await whole(defects, path, batch.endpoint, serves, self._max_requests)
            except NotFound as error:
                total, errors = 0, [{"code": error.code, "message": str(error), "param": "input_file_id", "line": None}]
            status = "failed" if errors else "in_progress"
            changes: dict[str, Any] = {"total": total, "errors": errors or None}
            await self._change(owner, batch.id, status, **changes)
            if errors:
                return
        async with self._turns[owner]:
            await self._answer(owner, batch, self._gateway.asked_by(batch.key_name), self._concurrency)

    async def _change(self, owner: str, batch_id: str, status: str, **changes: Any) -> None:
        """Unless it was told to end meanwhile."""
        await self._batches.change(
            owner, batch_id, lambda now: now if now.status == "cancelling" else now.to(status, **changes)
        )

    async def _answer(self, owner: str, batch: Batch, ask: Ask, concurrency: int) -> None:
        """Asks what has no line of answer or error yet. Raises NotWritten, StorageLimit."""
        with contextlib.ExitStack() as stack:
            answers, failures, index, descriptor = await whole(self._open, owner, batch, stack)
            done, failed = len(answers.finished), len(failures.finished)
            incoming = stack.enter_context(self._files.incoming(owner))

            def progress(tally: Tally) -> None:
                completed = done + tally.done - tally.failed
                self._batches.count(owner, batch.id, completed=completed, failed=failed + tally.failed)
                incoming.nbytes = answers.nbytes + failures.nbytes

            async def ask_if_room(request: Request) -> Reply:
                self._files.check_bytes(owner)
                return await ask(request)

            tally = Tally(total=index.total, skipped=index.skipped, bad=0)
            progress(tally)
            work = Work(ask_if_room, descriptor, answers, failures, tally, attempts=_ATTEMPTS, progress=progress)
            await work.run(index, concurrency)

    def _open(self, owner: str, batch: Batch, stack: contextlib.ExitStack) -> tuple[Answers, Answers, Index, int]:
        """Blocks. What it opens the stack closes."""
        source = self._files.path(owner, batch.input_file_id)
        answers = stack.enter_context(Answers(self._files.path(owner, batch.output_id)))
        failures = stack.enter_context(Answers(self._files.path(owner, batch.error_id)))
        index = lines.index(source, answers.finished | failures.finished)
        return answers, failures, index, stack.enter_context(_opened(source))

    async def _expire(self, owner: str, batch: Batch) -> None:
        """Each request that was not answered in time has a line that says so. Raises NotWritten."""
        error = {"code": "batch_expired", "message": "it could not be answered within the completion window"}

        def tell() -> tuple[int, int]:
            with contextlib.ExitStack() as stack:
                answers, failures, index, _ = self._open(owner, batch, stack)
                late = [place for places in index.by_model.values() for place in places]
                failures.append(lines.answer(place.custom_id, error=error) for place in late)
                return len(answers.finished), len(failures.finished) + len(late)

        if batch.status == "in_progress":
            completed, failed = await whole(tell)
            self._batches.count(owner, batch.id, completed=completed, failed=failed)

    async def _end(self, owner: str, batch: Batch, status: str, **changes: Any) -> None:
        """Its files become files of its owner, then it has ended. Raises StorageFailed."""
        published, now = [], int(time.time())
        output = self._files.path(owner, batch.output_id)
        if await whole(_size, output):
            changes["usage"] = await whole(usage_in, output)
        for file_id, what in ((batch.output_id, "output"), (batch.error_id, "errors")):
            nbytes = await whole(_size, self._files.path(owner, file_id))
            if nbytes:
                name = f"{batch.id}_{what}.jsonl"
                file = File(file_id, name, "batch_output", now, nbytes, now + batch.output_life_s)
                await self._files.add(owner, file)
                published.append(file_id)
            else:
                await self._files.delete(owner, file_id)
        changes["published"] = tuple(published)
        await self._batches.change(owner, batch.id, lambda batch: batch.to(status, **changes))
        _log.info("batch ended", batch=batch.id, status=status)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
