"""One request's sequences in the engine, as text."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal

from mball.errors import InvalidRequest, MballError, RequestError, Unavailable
from mball.server.engine.api import GenerateRequest, Generator, Output, SamplingParams
from mball.server.engine.grammar import Grammar
from mball.server.worker.detokenizer import Detokenizer
from mball.server.worker.stops import StopStrings
from mball.server.worker.tokenizer import Tokenizer

STALL_S = 900.0
"""A request none of whose sequences moves for so long is given up."""
MAX_BACKLOG = 65_536
"""Tokens that may wait for a reader who is too slow."""

Finish = Literal["stop", "length", "tool_calls"]


class NotResident(Unavailable):
    """The model's weights are not on the device."""

    code = "not_resident"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=1.0)


_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Job:
    """One choice: a prompt and how it is continued, with whom it shares KV, and a grammar of its own.

    Control tokens are in its text where they are `shown`.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    cache_salt: str | None = None
    grammar: Grammar | None = None
    shown: bool = False


@dataclass(slots=True)
class Delta:
    """What is new of one choice. `tokens` are filled where logprobs were asked for. `stop` ended it, a stop string."""

    index: int
    text: str = ""
    tokens: list[Output] = field(default_factory=list)
    finish_reason: Finish | None = None
    stop: str | None = None


class _Inbox:
    """From the engine's thread to the loop: a wake-up per batch, not per token."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._items: list[tuple[int, Output]] = []
        self._error: MballError | None = None
        self._ready = asyncio.Event()

    def put(self, index: int, output: Output) -> None:
        with self._lock:
            if len(self._items) >= MAX_BACKLOG:
                self._error = Unavailable("the answer was read too slowly", code="slow_reader")
            else:
                self._items.append((index, output))
            first = len(self._items) == 1
        if first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._ready.set)

    def fail(self, error: MballError) -> None:
        """In the loop's thread."""
        self._error = error
        self._ready.set()

    async def take(self) -> list[tuple[int, Output]]:
        """All that is there, at least one wake-up's. Raises what `fail` was given, TimeoutError past STALL_S."""
        async with asyncio.timeout(STALL_S):
            await self._ready.wait()
        self._ready.clear()
        with self._lock:
            items, self._items = self._items, []
        if self._error is not None:
            raise self._error
        return items


class _Choice:
    """The text of one sequence."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.index = index
        self.done = False
        self.tokens = 0
        self.cached_tokens = 0
        self._detokenizer = Detokenizer(tokenizer.text if job.shown else tokenizer.decode, job.prompt)
        self._stops = StopStrings(stops)
        self._min_tokens = job.sampling.min_tokens
        self._logprobs = job.sampling.logprobs is not None

    def take(self, output: Output, delta: Delta) -> bool:
        """Adds the output to the delta; True where a stop string ended the sequence before the engine did."""
        text, met = "", False
        self.cached_tokens += output.cached_tokens
        if output.token_id is not None:
            self.tokens += 1
            # A stop token is no part of the text.
            if output.finish_reason != "stop":
                text = self._detokenizer.add(output.token_id)
                if self._logprobs:
                    delta.tokens.append(output)
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        if self.tokens > self._min_tokens or output.finish_reason is not None:
            text, met = self._stops.add(text)
        if output.finish_reason is not None and not met:
            text += self._stops.flush()
        delta.text += text
        delta.stop = self._stops.met
        if met or output.finish_reason is not None:
            self.done = True
            delta.finish_reason = "length" if output.finish_reason == "length" and not met else "stop"
        return met and output.finish_reason is None


class Generation:
    """A context: its sequences run inside it, and none is left in the engine after it."""

    def __init__(self, engine: Generator, tokenizer: Tokenizer, jobs: Sequence[Job], stops: Sequence[str]) -> None:
        self._engine = engine
        self._jobs = jobs
        self._inbox = _Inbox()
        self._ids = [f"seq-{next(_numbers)}" for _ in jobs]
        self._choices = [_Choice(index, job, tokenizer, stops) for index, job in enumerate(jobs)]

    @property
    def size(self) -> int:
        return len(self._choices)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    @property
    def cached_tokens(self) -> int:
        """Of all prompts, each counted once: those of its first choice that were not computed."""
        first = {id(job.prompt): choice for job, choice in reversed(list(zip(self._jobs, self._choices, strict=True)))}
        return sum(choice.cached_tokens for choice in first.values())

    async def __aenter__(self) -> Generation:
        try:
            for index, (job, request_id) in enumerate(zip(self._jobs, self._ids, strict=True)):
                request = GenerateRequest(request_id, job.prompt, job.sampling, job.cache_salt, grammar=job.grammar)
                self._engine.submit(request, partial(self._inbox.put, index))
        except MballError:
            self._abort()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort()

    def _abort(self) -> None:
        for choice, request_id in zip(self._choices, self._ids, strict=True):
            if not choice.done:
                self._engine.abort(request_id)

    def fail(self, error: MballError) -> None:
        """Ends the request with this error."""
        self._inbox.fail(error)

    def _failure(self, index: int, output: Output) -> MballError:
        grammar = self._jobs[index].grammar
        if output.finish_reason == "error" and grammar is not None and grammar.too_complex:
            why = f"`{grammar.param}` can't be kept to: {grammar.error}"
            return InvalidRequest(why, param=grammar.param, code="invalid_schema")
        if output.finish_reason == "abort" or not self._engine.status().resident:
            return NotResident("the model left the device while it answered")
        return RequestError(output.error or "the engine failed", code="engine_error")

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is new, at most one delta a choice, until every choice is done. Raises MballError."""
        while not all(choice.done for choice in self._choices):
            try:
                items = await self._inbox.take()
            except TimeoutError:
                raise Unavailable(f"no token within {STALL_S:.0f} s", code="stalled") from None
            fresh: dict[int, Delta] = {}
            for index, output in items:
                choice = self._choices[index]
                if choice.done:
                    continue
                if output.finish_reason in ("abort", "error"):
                    raise self._failure(index, output)
                if choice.take(output, fresh.setdefault(index, Delta(index))):
                    self._engine.abort(self._ids[index])
            yield [delta for delta in fresh.values() if delta.text or delta.tokens or delta.finish_reason]
