from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mball.swap.budget import DAY_S, Budget

writes = st.lists(st.tuples(st.floats(0, DAY_S / 8), st.integers(1, 500), st.booleans()), max_size=60)


@given(writes, st.integers(500, 5000))
def test_no_day_has_more_than_its_limit_whatever_crashes(done: list[tuple[float, int, bool]], limit: int) -> None:
    """Each write says what is promised on the disk before, as the store does; a crash comes back with that."""
    now, by_day = 1e9, dict[int, int]()
    budget, on_disk = Budget(limit), (0, 0)
    for waited, nbytes, crash in done:
        now += waited
        if crash:
            budget = Budget(limit)
            budget.resume(*on_disk)
        if not budget.admits(nbytes, now):
            continue
        if not budget.promised(nbytes):
            budget.promised_bytes = budget.ahead(nbytes)
            on_disk = (budget.day, budget.promised_bytes)
        assert budget.promised(nbytes)
        budget.charge(nbytes, now)
        by_day[int(now // DAY_S)] = by_day.get(int(now // DAY_S), 0) + nbytes
    assert all(total <= limit for total in by_day.values())


def test_a_new_day_begins_anew_and_a_clock_set_back_does_not() -> None:
    budget = Budget(100)
    budget.charge(100, 10 * DAY_S)
    assert not budget.admits(1, 10 * DAY_S + 5)
    assert not budget.admits(1, 9 * DAY_S)
    assert not budget.admits(1, 10 * DAY_S + 5)
    assert budget.admits(100, 11 * DAY_S)


def test_a_clock_that_was_far_ahead_blocks_no_days() -> None:
    budget = Budget(100)
    budget.charge(100, 4000 * DAY_S)
    assert not budget.admits(1, 10 * DAY_S)
    assert budget.admits(100, 11 * DAY_S)


def test_no_limit() -> None:
    budget = Budget(None)
    budget.charge(1 << 60, 0.0)
    assert budget.admits(1 << 60, 0.0)
    assert budget.promised(1 << 60)
