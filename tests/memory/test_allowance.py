"""Saved switching time: never more switching over any time than was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.memory.allowance import Allowance

steps = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 5)), max_size=60)


def test_it_is_full_at_first_and_never_more_than_that() -> None:
    allowance = Allowance(0.2, 10.0, 100.0)
    assert allowance.at(100.0) == 10.0
    assert allowance.at(1e6) == 10.0


def test_what_was_overdrawn_is_made_up_for() -> None:
    allowance = Allowance(0.25, 1.0, 0.0)
    allowance.spend(3.0, 0.0)
    assert allowance.at(0.0) == -2.0
    assert allowance.at(8.0) == pytest.approx(0.0)
    assert allowance.at(10.0) == pytest.approx(0.5)


@given(steps=steps, share=st.floats(0.01, 0.9), most_s=st.floats(0, 30))
def test_over_any_time_switching_keeps_to_its_share(
    steps: list[tuple[float, float]], share: float, most_s: float
) -> None:
    allowance, now, spent = Allowance(share, most_s, 0.0), 0.0, [(0.0, 0.0)]
    for pause_s, swap_s in steps:
        now += pause_s
        if allowance.at(now) > 0:
            allowance.spend(swap_s, now)
            spent.append((now, swap_s))
    for first in range(1, len(spent)):
        total = 0.0
        for at_s, swap_s in spent[first:]:
            total += swap_s
            assert total - swap_s <= most_s + share * (at_s - spent[first][0]) + 1e-6
