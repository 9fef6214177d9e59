"""One model's door: who waits before it, who is inside."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mball.errors import MballError, QueueTimeout
from mball.memory.rates import Rate


@dataclass(eq=False)
class Ticket:
    """Leave to send one request to a worker. `lost` is set when the worker ends before the request has."""

    model: str
    socket_path: str
    lost: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Waiter:
    """`answer` gives a Ticket, or None to one that only waits until the model is there (`visitor`)."""

    answer: asyncio.Future[Ticket | None]
    since_s: float
    visitor: bool


class Queue:
    """Requests enter in the order of their arrival while the door is open and fewer than `limit` are inside."""

    def __init__(self, model: str, limit: int, rate: Rate, changed: Callable[[], None]) -> None:
        """`changed` is told when somebody joins or leaves."""
        self.model = model
        self._changed = changed
        self.limit = limit
        self.rate = rate
        self.last_used_s = time.monotonic()
        self.inside: set[Ticket] = set()
        self._socket_path: str | None = None
        self._waiting: deque[_Waiter] = deque()
        self._left = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._socket_path is not None

    @property
    def would_wait(self) -> bool:
        """Whether one that came now would have to wait."""
        return self._socket_path is None or len(self.inside) >= self.limit

    @property
    def in_flight(self) -> int:
        return len(self.inside)

    def __len__(self) -> int:
        return len(self._waiting)

    def oldest_wait_s(self, now_s: float) -> float:
        return now_s - self._waiting[0].since_s if self._waiting else 0.0

    async def enter(self, deadline_s: float, *, visitor: bool = False) -> Ticket | None:
        """Waits its turn. Raises QueueTimeout, or what `refuse` was given."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), time.monotonic(), visitor)
        if not visitor:
            self.rate.count(waiter.since_s)
        self._waiting.append(waiter)
        self._let_in()
        self._changed()
        try:
            await asyncio.wait({waiter.answer}, timeout=deadline_s)
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        if not waiter.answer.done():
            self._withdraw(waiter)
            raise QueueTimeout(f"{self.model}: not on the device within {deadline_s:.1f} s, {len(self)} more wait")
        return waiter.answer.result()

    def leave(self, ticket: Ticket) -> None:
        """Idempotent."""
        if ticket in self.inside:
            self.inside.remove(ticket)
            self.last_used_s = time.monotonic()
            self._left.set()
            self._let_in()
            self._changed()

    def open(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._let_in()

    def close(self) -> None:
        """Nobody enters any more; those inside go on."""
        self._socket_path = None

    def lose(self) -> None:
        """The worker is gone: the door closes and those inside are told. Each still leaves by itself."""
        self.close()
        for ticket in self.inside:
            ticket.lost.set()

    def refuse(self, error: Callable[[], MballError]) -> None:
        """Ends everybody's wait, each with an error of its own."""
        while self._waiting:
            answer = self._waiting.popleft().answer
            if not answer.done():
                answer.set_exception(error())

    async def empty(self, deadline_s: float) -> bool:
        """Waits until nobody is inside; False where the deadline came first."""
        try:
            async with asyncio.timeout(deadline_s):
                while self.inside:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            return False
        return True

    def _let_in(self) -> None:
        if self._socket_path is None:
            return
        for visitor in [waiter for waiter in self._waiting if waiter.visitor]:
            self._waiting.remove(visitor)
            visitor.answer.set_result(None)
        while self._waiting and len(self.inside) < self.limit:
            ticket = Ticket(self.model, self._socket_path)
            self.inside.add(ticket)
            self._waiting.popleft().answer.set_result(ticket)

    def _withdraw(self, waiter: _Waiter) -> None:
        """The caller gave up: its place, or the ticket it has just been given, is free again."""
        if not waiter.answer.done():
            waiter.answer.cancel()
            self._waiting.remove(waiter)
            self._changed()
        elif not waiter.answer.cancelled() and waiter.answer.exception() is None:
            ticket = waiter.answer.result()
            if ticket is not None:
                self.leave(ticket)
