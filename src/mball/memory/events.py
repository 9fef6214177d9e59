"""What was decided and done, and why: kept for a while, logged, and told to whoever follows."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

_log = structlog.get_logger("mball.decisions")
_KEPT = 1024
_BACKLOG = 256

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """`number` counts from 1; `at` is in seconds since 1970; `model` None: of the whole; `figures` are what `reason`
    is about, for machines."""

    number: int
    at: float
    kind: str
    model: str | None
    reason: str
    figures: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "at": self.at,
            "kind": self.kind,
            "model": self.model,
            "reason": self.reason,
            **{name: value for name, value in self.figures.items() if value is not None},
        }


class Follower:
    """One reader's events, oldest first. One that is slower than what happens is left behind: `lost` then says so, and
    the iteration ends once it has read what it was given."""

    def __init__(self, waiting: list[Event], missed: int) -> None:
        self.missed = missed
        self.lost = False
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        for event in waiting:
            self._events.put_nowait(event)
        self._limit = len(waiting) + _BACKLOG

    def tell(self, event: Event | None) -> None:
        """None: there will be no more."""
        if self.lost:
            return
        self.lost = event is not None and self._events.qsize() >= self._limit
        self._events.put_nowait(None if self.lost else event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            yield event


class Events:
    """A ring of the last events. Of one asyncio loop. `told` is called after each."""

    def __init__(self, kept: int = _KEPT, told: Callable[[], None] = lambda: None) -> None:
        self._told = told
        self.boot = uuid.uuid4().hex[:8]
        self._ring: deque[Event] = deque(maxlen=kept)
        self._last: dict[str, Event] = {}
        self._followers: set[Follower] = set()
        self._number = 0

    def record(self, kind: str, model: str | None, reason: str = "", *, level: Level = "info", **figures: Any) -> Event:
        """Keeps, logs and tells it."""
        self._number += 1
        event = Event(self._number, time.time(), kind, model, reason, figures)
        self._ring.append(event)
        if model is not None:
            self._last[model] = event
        told = {"model": model, "reason": reason or None, **figures}
        _log.log(_LEVELS[level], kind, **{name: value for name, value in told.items() if value is not None})
        for follower in list(self._followers):
            follower.tell(event)
            if follower.lost:
                self._followers.discard(follower)
        self._told()
        return event

    def last(self, model: str) -> Event | None:
        return self._last.get(model)

    def recent(self, count: int) -> list[Event]:
        return list(self._ring)[-count:] if count > 0 else []

    def id_of(self, event: Event) -> str:
        """Names the event among those of all servers."""
        return f"{self.boot}-{event.number}"

    def follow(self, after: str | None = None, recent: int = 0) -> Follower:
        """What comes after the event of that id, or the last `recent` and what comes then; `leave` ends it.

        Events that the ring no longer holds, or that another server had, are counted as `missed` (at least one).
        """
        waiting, missed = self.recent(recent), 0
        if after is not None:
            boot, _, number = after.rpartition("-")
            known = boot == self.boot and number.isdecimal() and int(number) <= self._number
            seen = int(number) if known else 0
            waiting = [event for event in self._ring if event.number > seen]
            first = waiting[0].number if waiting else self._number + 1
            missed = first - seen - 1 if known else max(1, first - 1)
        follower = Follower(waiting, missed)
        self._followers.add(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        """Idempotent."""
        self._followers.discard(follower)

    def close(self) -> None:
        """Ends every follower's iteration."""
        for follower in self._followers:
            follower.tell(None)
        self._followers.clear()


_LEVELS = {"info": 20, "warning": 30, "error": 40}
