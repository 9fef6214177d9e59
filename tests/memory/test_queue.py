from __future__ import annotations

import asyncio

import pytest

from mball.errors import Draining, QueueTimeout
from mball.memory.queue import Queue, Ticket
from mball.memory.rates import Rate


@pytest.fixture
def changes() -> list[None]:
    return []


@pytest.fixture
def passes() -> list[None]:
    return []


@pytest.fixture
def queue(changes: list[None], passes: list[None]) -> Queue:
    return Queue("m", 2, Rate(60.0), lambda: changes.append(None), lambda: passes.append(None))


async def waiting(queue: Queue, count: int, **options: bool) -> list[asyncio.Task[Ticket | None]]:
    tasks = [asyncio.create_task(queue.enter(30.0, **options)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_they_enter_in_order_and_no_more_than_may_be_inside(queue: Queue) -> None:
    tasks = await waiting(queue, 4)
    queue.open("/s")
    await asyncio.sleep(0.01)
    assert [task.done() for task in tasks] == [True, True, False, False]
    first = tasks[0].result()
    assert first is not None
    assert first.socket_path == "/s"
    queue.leave(first)
    queue.leave(first)
    await asyncio.sleep(0.01)
    assert [task.done() for task in tasks] == [True, True, True, False]
    assert (queue.in_flight, len(queue)) == (2, 1)
    queue.refuse(lambda: Draining("x"))
    with pytest.raises(Draining):
        await tasks[3]


async def test_the_lowest_priority_enters_first_and_who_withdraws_takes_no_turn(queue: Queue) -> None:
    queue.limit = 1
    asked = {"a": 5, "b": 0, "c": -1, "d": 0, "e": -1}
    tasks = {name: asyncio.create_task(queue.enter(30.0, priority=n)) for name, n in asked.items()}
    await asyncio.sleep(0)
    tasks["c"].cancel()
    await asyncio.sleep(0)
    assert len(queue) == 4
    queue.open("/s")
    for name in "ebda":
        ticket = await tasks[name]
        assert not [other for other in "ebda"["ebda".index(name) + 1 :] if tasks[other].done()]
        assert ticket is not None
        queue.leave(ticket)
    assert (queue.in_flight, len(queue)) == (0, 0)


async def test_what_one_more_would_wait_follows_from_what_others_took(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("mball.memory.queue.time.monotonic", lambda: now)
    assert queue.turn_s == 0.0
    queue.open("/s")
    first, second = await queue.enter(1.0), await queue.enter(1.0)
    assert first is not None
    assert second is not None
    now += 6.0
    queue.leave(first)
    assert queue.turn_s == 0.0
    queue.leave(second)
    for _ in range(2):
        await queue.enter(1.0)
    assert queue.turn_s == pytest.approx(3.0)
    tasks = await waiting(queue, 3)
    assert queue.turn_s == pytest.approx(12.0)
    queue.refuse(lambda: Draining("x"))
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_nobody_enters_a_closed_door_and_those_inside_go_on(queue: Queue) -> None:
    queue.open("/s")
    inside = await queue.enter(1.0)
    queue.close()
    with pytest.raises(QueueTimeout):
        await queue.enter(0.02)
    assert inside is not None
    assert not inside.lost.is_set()
    assert not await queue.empty(0.02)
    queue.leave(inside)
    assert await queue.empty(0.02)


async def test_a_lost_worker_is_told_to_those_inside(queue: Queue) -> None:
    queue.open("/s")
    inside = await queue.enter(1.0)
    queue.lose()
    assert inside is not None
    assert inside.lost.is_set()
    assert queue.in_flight == 1
    assert not queue.is_open


async def test_a_visitor_enters_with_the_opening_and_takes_no_place(queue: Queue) -> None:
    requests = await waiting(queue, 3)
    visitor = (await waiting(queue, 1, visitor=True))[0]
    queue.open("/s")
    assert await asyncio.wait_for(visitor, 1.0) is None
    assert queue.in_flight == 2
    queue.refuse(lambda: Draining("x"))
    await asyncio.wait(requests)
    with pytest.raises(Draining):
        requests[2].result()


async def test_one_that_gives_up_leaves_no_trace(queue: Queue) -> None:
    tasks = await waiting(queue, 2)
    tasks[0].cancel()
    await asyncio.sleep(0.01)
    assert len(queue) == 1
    queue.open("/s")
    tasks[1].cancel()  # in the very moment in which it got its ticket
    await asyncio.wait(tasks)
    assert (queue.in_flight, len(queue)) == (0, 0)


async def test_one_refused_in_the_moment_it_gives_up(queue: Queue) -> None:
    tasks = await waiting(queue, 1)
    queue.refuse(lambda: Draining("x"))
    tasks[0].cancel()
    await asyncio.wait(tasks)
    assert (queue.in_flight, len(queue)) == (0, 0)


async def test_each_change_is_told(queue: Queue, changes: list[None], passes: list[None]) -> None:
    tasks = await waiting(queue, 1)
    assert (len(changes), len(passes)) == (1, 0)
    queue.open("/s")
    ticket = await tasks[0]
    assert ticket is not None
    queue.leave(ticket)
    assert (len(changes), len(passes)) == (1, 1)
    ticket = await queue.enter(1.0)
    assert ticket is not None
    queue.leave(ticket)
    assert (len(changes), len(passes)) == (1, 3)
    queue.close()
    with pytest.raises(QueueTimeout):
        await queue.enter(0.0)
    assert (len(changes), len(passes)) == (3, 3)


async def test_nobody_passes_those_that_wait_where_more_may_be_inside_than_before(queue: Queue) -> None:
    queue.open("/s")
    tasks = await waiting(queue, 4)
    queue.limit = 3
    last = (await waiting(queue, 1))[0]
    assert [task.done() for task in (*tasks, last)] == [True, True, False, False, False]
    await asyncio.wait(tasks[:3])
    assert (queue.in_flight, len(queue)) == (3, 2)
    queue.refuse(lambda: Draining("x"))
    await asyncio.gather(*tasks, last, return_exceptions=True)


async def test_waiting_times_and_rates_count_requests(queue: Queue) -> None:
    loop = asyncio.get_running_loop()
    tasks = await waiting(queue, 2)
    await asyncio.sleep(0.05)
    assert queue.oldest_wait_s(loop.time()) >= 0.05
    assert queue.rate.at(loop.time()) == pytest.approx(2 / 60, rel=0.01)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert queue.oldest_wait_s(loop.time()) == 0.0
