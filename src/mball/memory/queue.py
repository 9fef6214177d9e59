"""One model's door: who waits before it, who is inside."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from mball.errors import MballError, QueueTimeout
from mball.memory.rates import Rate, Smoothed


@dataclass(eq=False)
class Ticket:
    """Leave to send one request to a worker. `lost` is set when the worker ends before the request has."""

    model: str
    socket_path: str
    since_s: float = 0.0
    lost: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Waiter:
    """`answer` gives a Ticket, or None to one that only waits until the model is there (`visitor`)."""

    answer: asyncio.Future[Ticket | None]
    since_s: float
    visitor: bool


class Queue:
    """Requests enter while the door is open and fewer than `limit` are inside: those of the lowest `priority` first, in
    the order of their arrival. `service_s`: how long one is inside."""

    def __init__(
        self, model: str, limit: int, rate: Rate, changed: Callable[[], None], passed: Callable[[], None]
    ) -> None:
        """`changed` is told when somebody begins to wait or gives up, `passed` when one enters at once or leaves."""
        self.model = model
        self._changed = changed
        self._passed = passed
        self.limit = limit
        self.rate = rate
        self.last_used_s = time.monotonic()
        self.inside: set[Ticket] = set()
        self._socket_path: str | None = None
        self.service_s = Smoothed()
        self._numbers = itertools.count()
        self._waiting: OrderedDict[int, _Waiter] = OrderedDict()
        # Those that have withdrawn stay there until their turn.
        self._turns: list[tuple[int, int]] = []
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
        return now_s - next(iter(self._waiting.values())).since_s if self._waiting else 0.0

    @property
    def turn_s(self) -> float:
        """How long one that came now would wait before the open door, as far as was measured."""
        ahead = len(self) + self.in_flight - self.limit + 1
        return (self.service_s.value or 0.0) * max(0, ahead) / self.limit

    async def enter(self, deadline_s: float, *, visitor: bool = False, priority: int = 0) -> Ticket | None:
        """Waits its turn. Raises QueueTimeout, or what `refuse` was given."""
        now_s = time.monotonic()
        if not visitor:
            self.rate.count(now_s)
            if self._socket_path is not None and len(self.inside) < self.limit and not self._waiting:
                ticket = self._give(self._socket_path, now_s)
                self._passed()
                return ticket
        waiter = _Waiter(asyncio.get_running_loop().create_future(), now_s, visitor)
        number = next(self._numbers)
        self._waiting[number] = waiter
        if not visitor:
            heapq.heappush(self._turns, (priority, number))
        self._let_in()
        self._changed()
        try:
            await asyncio.wait({waiter.answer}, timeout=deadline_s)
        except asyncio.CancelledError:
            self._withdraw(number, waiter)
            raise
        if not waiter.answer.done():
            self._withdraw(number, waiter)
            raise QueueTimeout(f"{self.model}: not on the device within {deadline_s:.1f} s, {len(self)} more wait")
        return waiter.answer.result()

    def leave(self, ticket: Ticket) -> None:
        """Idempotent."""
        if ticket in self.inside:
            self.inside.remove(ticket)
            self.last_used_s = time.monotonic()
            self.service_s.add(self.last_used_s - ticket.since_s)
            self._left.set()
            self._let_in()
            self._passed()

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
        self._turns.clear()
        while self._waiting:
            answer = self._waiting.popitem(last=False)[1].answer
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
        for number in [number for number, waiter in self._waiting.items() if waiter.visitor]:
            self._waiting.pop(number).answer.set_result(None)
        while self._turns and len(self.inside) < self.limit:
            waiter = self._waiting.pop(heapq.heappop(self._turns)[1], None)
            if waiter is not None:
                waiter.answer.set_result(self._give(self._socket_path, time.monotonic()))

    def _give(self, socket_path: str, now_s: float) -> Ticket:
        ticket = Ticket(self.model, socket_path, now_s)
        self.inside.add(ticket)
        return ticket

    def _withdraw(self, number: int, waiter: _Waiter) -> None:
        """The caller gave up: its place, or the ticket it has just been given, is free again."""
        if not waiter.answer.done():
            waiter.answer.cancel()
            del self._waiting[number]
            self._changed()
        elif not waiter.answer.cancelled() and waiter.answer.exception() is None:
            ticket = waiter.answer.result()
            if ticket is not None:
                self.leave(ticket)
