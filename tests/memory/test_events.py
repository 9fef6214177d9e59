"""The log of decisions: bounded, ordered, resumed, and never held up by a slow reader."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mball.memory import events as module
from mball.memory.events import Event, Events, Follower


async def read(follower: Follower, count: int) -> list[int]:
    found: list[Event] = []
    async with asyncio.timeout(5):
        async for event in follower:
            found.append(event)
            if len(found) == count:
                break
    return [event.number for event in found]


async def test_what_is_recorded_is_kept_logged_and_told() -> None:
    events = Events()
    follower = events.follow()
    with capture_logs() as logs:
        events.record("demoted", "b", "0.02 req/s × 0.40 s ÷ 15.0 GiB is the lowest", frees_bytes=7, nothing=None)
    assert logs[0]["event"] == "demoted"
    assert logs[0]["log_level"] == "info"
    assert await read(follower, 1) == [1]
    told = events.recent(5)[0].as_dict()
    assert told.pop("at") > 1e9
    assert told == {
        "number": 1,
        "kind": "demoted",
        "model": "b",
        "reason": "0.02 req/s × 0.40 s ÷ 15.0 GiB is the lowest",
        "frees_bytes": 7,
    }
    last = events.last("b")
    assert last is not None
    assert last.number == 1
    assert events.last("a") is None


async def test_the_ring_is_bounded() -> None:
    events = Events(kept=3)
    for _ in range(5):
        events.record("promoted", "a")
    assert [event.number for event in events.recent(10)] == [3, 4, 5]
    assert events.recent(0) == []


async def test_following_resumes_after_an_id() -> None:
    events = Events(kept=3)
    third = [events.record("promoted", "a") for _ in range(4)][2]
    follower = events.follow(after=events.id_of(third))
    events.record("demoted", "a")
    assert follower.missed == 0
    assert await read(follower, 2) == [4, 5]


async def test_what_the_ring_no_longer_holds_is_said_to_be_missed() -> None:
    events = Events(kept=3)
    first = events.record("promoted", "a")
    for _ in range(5):
        events.record("promoted", "a")
    follower = events.follow(after=events.id_of(first))
    assert follower.missed == 2
    assert await read(follower, 3) == [4, 5, 6]
    for strange in ("other-3", "", f"{events.boot}-99", f"{events.boot}-x", f"{events.boot}--1"):
        assert events.follow(after=strange).missed == 3


async def test_a_slow_reader_is_left_behind_and_told() -> None:
    events = Events()
    slow, quick = events.follow(), events.follow()
    for number in range(module._BACKLOG + 10):
        events.record("promoted", "a")
        assert await read(quick, 1) == [number + 1]
    assert slow.lost
    assert not quick.lost
    assert slow not in events._followers
    async with asyncio.timeout(5):
        numbers = [event.number async for event in slow]
    assert numbers == list(range(1, module._BACKLOG + 1))


async def test_the_end_ends_every_iteration() -> None:
    events = Events()
    follower = events.follow()
    events.record("promoted", "a")
    events.close()
    async with asyncio.timeout(5):
        assert [event.number async for event in follower] == [1]
    events.leave(follower)


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_nothing_is_told_twice_and_what_is_missing_is_counted(kept: int, before: int, seen: int) -> None:
    events = Events(kept=kept)
    for _ in range(before):
        events.record("promoted", "a")
    seen = min(seen, before)

    async def follow() -> None:
        follower = events.follow(after=f"{events.boot}-{seen}")
        held = min(kept, before - seen)
        assert follower.missed == before - seen - held
        events.close()
        assert [event.number async for event in follower] == list(range(before - held + 1, before + 1))

    asyncio.run(follow())
